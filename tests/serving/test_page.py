"""The page in a real browser: a chat that streams, what is protected, what goes wrong, by keyboard and on a phone."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from obfuscatune.serving.limits import ServerLimits

from .conftest import TOKEN, Running, serving

Driver = webdriver.Chrome


@pytest.fixture(autouse=True)
def fresh(browser: Driver, server: Running) -> Iterator[None]:
    """A page without a token; afterwards, nothing that the page's own rules had to stop."""
    browser.get(server.url)
    browser.execute_script("sessionStorage.clear()")
    browser.get_log("browser")
    yield
    logged = [entry["message"] for entry in browser.get_log("browser")]
    assert not [line for line in logged if "Content Security Policy" in line or "Uncaught" in line]


def by_id(browser: Driver, name: str):
    return browser.find_element(By.ID, name)


def wait(browser: Driver, true: Callable[[], object]) -> None:
    WebDriverWait(browser, 20, poll_frequency=0.02).until(lambda _: true())


def open_page(browser: Driver, server: Running) -> None:
    browser.get("about:blank")
    browser.get(f"{server.url}/#token={TOKEN}")
    wait(browser, by_id(browser, "prompt").is_displayed)


def answers(browser: Driver) -> list[str]:
    found = browser.find_elements(By.CSS_SELECTOR, "li.assistant")
    return [item.get_property("textContent") for item in found]


def is_ready(browser: Driver) -> bool:
    return by_id(browser, "send").is_enabled()


def test_a_chat_by_click_streams_and_goes_on(browser: Driver, server: Running, expect) -> None:
    open_page(browser, server)
    assert TOKEN not in browser.current_url  # nor in the history
    by_id(browser, "model").send_keys("clinic")
    longest = by_id(browser, "longest")
    longest.clear()
    longest.send_keys("12")
    # Every text that the answer had: it grew, rather than came at once.
    browser.execute_script(
        "window.seen = []; new MutationObserver(() => { const all = document.querySelectorAll('li.assistant');"
        "window.seen.push(all[all.length - 1]?.textContent || ''); })"
        ".observe(document.getElementById('messages'), {childList: true, subtree: true, characterData: true})"
    )
    by_id(browser, "prompt").send_keys("<b>hi</b>")
    by_id(browser, "send").click()
    wait(browser, lambda: is_ready(browser) and answers(browser))
    messages = [{"role": "user", "content": "<b>hi</b>"}]
    first = expect("clinic", messages, 12)
    assert answers(browser) == [first]
    assert len(set(browser.execute_script("return window.seen"))) > 4
    assert not browser.find_elements(By.CSS_SELECTOR, "li.user b")  # a text is no HTML
    longest.clear()
    longest.send_keys("4")
    by_id(browser, "prompt").send_keys("on" + Keys.ENTER)
    wait(browser, lambda: is_ready(browser) and len(answers(browser)) == 2)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "on"}]
    assert answers(browser)[1] == expect("clinic", messages, 4)
    by_id(browser, "clear").click()
    assert not answers(browser)


@pytest.mark.parametrize("when", ["before any text", "in the middle of it"])
def test_a_new_conversation_forgets_the_old_one_though_an_answer_was_under_way(
    browser: Driver, server: Running, expect, when: str
) -> None:
    open_page(browser, server)
    by_id(browser, "model").send_keys("clinic")
    longest = by_id(browser, "longest")
    longest.clear()
    longest.send_keys("4")
    by_id(browser, "prompt").send_keys("first" + Keys.ENTER)
    wait(browser, lambda: is_ready(browser) and answers(browser))
    clear = "document.getElementById('clear').click()"
    if when == "in the middle of it":
        browser.execute_script(
            "new MutationObserver((_, me) => { const all = document.querySelectorAll('li.assistant');"
            f"if (all[1]?.textContent) {{ me.disconnect(); {clear}; }} }})"
            ".observe(document.getElementById('messages'), {childList: true, subtree: true, characterData: true})"
        )
    by_id(browser, "prompt").send_keys("second")
    submit = "document.getElementById('ask').requestSubmit()"
    browser.execute_script(f"{submit}; {clear}" if when == "before any text" else submit)
    wait(browser, lambda: is_ready(browser) and not answers(browser))
    prompt = by_id(browser, "prompt")
    prompt.clear()
    prompt.send_keys("third" + Keys.ENTER)
    wait(browser, lambda: is_ready(browser) and answers(browser))
    assert answers(browser) == [expect("clinic", [{"role": "user", "content": "third"}], 4)]


def test_it_says_what_is_protected_and_what_is_not(browser: Driver, server: Running) -> None:
    open_page(browser, server)
    assert "not attested" in by_id(browser, "attested").text
    assert by_id(browser, "profile").text.startswith("balanced: ")
    assert "prompts, answers" in by_id(browser, "hidden").text
    assert "attention maps" in by_id(browser, "shown").text


def test_an_error_is_shown_and_the_question_kept(browser: Driver, server: Running) -> None:
    open_page(browser, server)
    by_id(browser, "prompt").send_keys("x" * 200)
    by_id(browser, "send").click()
    wait(browser, lambda: by_id(browser, "error").text)
    assert "the model's context is 96" in by_id(browser, "error").text
    assert by_id(browser, "prompt").get_property("value") == "x" * 200
    assert not answers(browser)


def test_an_answer_can_be_stopped(browser: Driver, open_served) -> None:
    with serving(open_served("balanced"), ServerLimits()) as server:
        open_page(browser, server)
        # The click follows the first piece at once: the answer of this small model is there in a moment.
        browser.execute_script(
            "new MutationObserver((_, me) => { if (document.querySelector('li.assistant')?.textContent) {"
            "me.disconnect(); document.getElementById('stop').click(); } })"
            ".observe(document.getElementById('messages'), {childList: true, subtree: true, characterData: true})"
        )
        by_id(browser, "prompt").send_keys("go" + Keys.ENTER)
        wait(browser, lambda: is_ready(browser) and answers(browser))
        wait(browser, lambda: server.batcher.load() == (0, 0))
        assert by_id(browser, "error").text == ""


def test_a_wrong_token_is_refused_and_the_right_one_opens(browser: Driver, server: Running) -> None:
    browser.get(f"{server.url}/#token=wrong")
    browser.refresh()
    wait(browser, lambda: "valid token" in by_id(browser, "entry-error").text)
    assert not by_id(browser, "chat").is_displayed()
    assert browser.switch_to.active_element == by_id(browser, "token")
    by_id(browser, "token").send_keys(TOKEN + Keys.ENTER)
    wait(browser, by_id(browser, "prompt").is_displayed)
    browser.refresh()  # the tab remembers it
    wait(browser, by_id(browser, "prompt").is_displayed)


def test_it_can_be_used_by_keyboard_alone_and_on_a_phone(browser: Driver, server: Running, tmp_path: Path) -> None:
    browser.set_window_size(390, 800)
    open_page(browser, server)
    assert browser.switch_to.active_element == by_id(browser, "prompt")
    width, screen = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert width <= screen
    by_id(browser, "prompt").send_keys("tab" + Keys.TAB)
    reached = []
    for _ in range(4):
        reached.append(browser.switch_to.active_element.get_attribute("id"))
        browser.switch_to.active_element.send_keys(Keys.TAB)
    assert reached[:2] == ["longest", "send"]
    by_id(browser, "send").send_keys(Keys.ENTER)
    wait(browser, lambda: is_ready(browser) and answers(browser))
    browser.set_window_size(1200, 800)
    # Everything that the page has asked for came from its own server.
    names = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert names and all(name.startswith(server.url) for name in names)


def test_no_script_and_no_server_of_elsewhere_is_used(browser: Driver, server: Running) -> None:
    """Whatever a text brings into the page."""
    open_page(browser, server)
    insert = (
        "const made = document.createElement('script'); made.textContent = 'window.ran = true';"
        "document.body.append(made); return window.ran === true"
    )
    assert browser.execute_script(insert) is False
    ask = "const [url, done] = arguments; fetch(url, {mode: 'no-cors'}).then(() => done('sent'), () => done('refused'))"
    show = (
        "const [url, done] = arguments, image = new Image();"
        "image.onload = image.onerror = () => done(); image.src = url"
    )
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        url = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/"
        assert browser.execute_async_script(ask, url) == "refused"
        browser.execute_async_script(show, url)
        elsewhere.setblocking(False)
        with pytest.raises(BlockingIOError):
            elsewhere.accept()
    logged = "".join(entry["message"] for entry in browser.get_log("browser"))
    assert all(rule in logged for rule in ("script-src 'self'", "connect-src 'self'", "img-src data:"))
    assert server.get("/", token=None).headers["content-security-policy"].startswith("default-src 'none'; ")
