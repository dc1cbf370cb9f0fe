"""``obfuscatune connect``: the real client over a real attested channel, to an enclave on a simulated platform."""

import io
import json
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from selenium.webdriver.common.keys import Keys

from obfuscatune.cli import main
from obfuscatune.errors import ConsentError, UsageError
from obfuscatune.parties.attestation.platform import open_platform
from obfuscatune.parties.channel import AttestedServer
from obfuscatune.parties.identity import Identity, PublicIdentity
from obfuscatune.parties.job import Job, SignedJob

from .test_page import answers, by_id, is_ready, wait

LAB, CLINIC, ENCLAVE = (Identity.generate(name, "x25519") for name in ("lab", "clinic", "enclave"))
QUOTA = 6


class Model:
    """What an enclave answers: the question in capitals, word by word, as long as the job gives queries."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.told = 0
        self.job: dict[str, Any] = {"status": "done", "step": 60, "steps": 60}
        self.go = threading.Semaphore(0)  # for each word of a prompt that says "slowly"
        self.left = threading.Event()
        self.breaks = self.fails = False

    def __call__(self, party: PublicIdentity, fields: dict[str, Any], payload: bytes) -> Any:
        if fields["op"] == "status":
            self.told += 1
            return {**self.job, "queries": len(self.asked)}, b""
        (prompt,) = json.loads(payload)
        if prompt == "endless":  # in the words of `training.completion`
            raise UsageError("prompt is too long for the model", got="9 tokens", expected="at most 8")
        if len(self.asked) == QUOTA:
            raise ConsentError("queries of the job are used up")
        self.asked.append((fields["max_new_tokens"], prompt, fields["sampling"]))
        return self.answer(prompt if isinstance(prompt, str) else prompt[-1]["content"], fields["sampling"])

    def answer(self, text: str, sampling: dict[str, Any]) -> Any:
        for stop in sampling.get("stop", []):
            text = text.upper().split(stop)[0]
        words = text.upper().split(" ")
        try:
            if self.fails:
                raise RuntimeError(f"it cannot take {text}")
            for number, word in enumerate(words, 1):
                while "SLOWLY" in words and not self.go.acquire(timeout=0.02):
                    yield None
                if word == "BROKEN" and self.breaks:
                    self.stop()  # type: ignore[attr-defined]
                yield {"tokens": number}, f"{word} ".encode()
        except GeneratorExit:
            self.left.set()
            raise
        return {"prompt_tokens": [3], "completion_tokens": [len(words)], "ended": [1]}, b""


@pytest.fixture(scope="module")
def simulation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("platform") / "simulation"


@pytest.fixture(scope="module")
def platform(simulation: Path) -> Any:
    return open_platform(f"simulation:{simulation}")


Start = Callable[[Identity, str], tuple[str, Model]]
Connected = tuple[str, str, list[str], list[int]]


@pytest.fixture
def start(platform: Any) -> Iterator[Start]:
    with ExitStack() as stack:

        def start(identity: Identity, address: str = "tls://127.0.0.1:0") -> tuple[str, Model]:
            model = Model()
            server = AttestedServer(
                address, identity=identity, attester=platform.attester, handle=model, allow=lambda _: True
            )
            thread = threading.Thread(target=server.serve_forever)
            thread.start()

            def stop() -> None:
                server.close()
                thread.join(20)
                model.stopped.set()  # type: ignore[attr-defined]

            stack.callback(stop)
            model.stopped = threading.Event()  # type: ignore[attr-defined]
            model.stop = stop  # type: ignore[attr-defined]
            return server.address, model

        yield start


@pytest.fixture
def files(platform: Any, simulation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options of connect but for the address, in a directory with all that they name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clinic.key").write_bytes(CLINIC.to_bytes())
    (tmp_path / "clinic.key").chmod(0o600)
    root = simulation / "simulation-root.pem"
    (tmp_path / "policy.toml").write_text(
        f'[platform]\nkinds = ["tdx"]\n[measurements]\nmrtd = ["{platform.measurements()["mrtd"]}"]\n'
        f'[simulation]\nallow = true\nroot = "{root}"\n'
    )
    job = Job(
        provider=LAB.public.fingerprint,
        owner=CLINIC.public.fingerprint,
        enclave=ENCLAVE.public.fingerprint,
        model="aa" * 32,
        data="bb" * 32,
        expires=int(time.time()) + 3600,
        queries_by=("owner",),
        max_queries=QUOTA,
        max_new_tokens=5,
    )
    (tmp_path / "job.json").write_bytes(SignedJob(job).sign(LAB).sign(CLINIC).to_bytes())
    line = ["--job", "job.json", "--identity", "clinic.key", "--policy", "policy.toml"]
    return [*line, "--port", "0", "--allow-simulation"]


@contextmanager
def resetting(address: str) -> Iterator[None]:
    """A forwarder at an address with nothing behind it: it takes connections, and resets them."""
    host, port = address.removeprefix("tls://").split(":")
    with socket.create_server((host, int(port))) as listener:

        def forward() -> None:
            with suppress(OSError):  # shut down
                while True:
                    accepted, _ = listener.accept()
                    accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    accepted.close()

        thread = threading.Thread(target=forward)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(20)


@contextmanager
def connected(address: str, files: list[str]) -> Iterator[Connected]:
    """``connect`` in a thread; url, token, what it said, and its exit code once it has ended."""
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["connect", "--enclave", address, *files])), daemon=True)
    # pytest's capture drops what another thread writes while it is read.
    with redirect_stdout(io.StringIO()) as said:
        thread.start()
        while "page: " not in said.getvalue():
            assert thread.is_alive()
            thread.join(0.02)
    lines = said.getvalue().splitlines()
    yield lines[-3].split()[-1], lines[-2].split()[-1], lines, codes
    thread.join(30)


def test_the_usual_client_over_an_attested_channel(
    start: Start, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    address, model = start(ENCLAVE)
    with connected(address, files[2:]) as (url, token, lines, codes):
        assert any(line.startswith("accepted; SIMULATION") for line in lines)
        curl = ["curl", "--silent", "--max-time", "30", "-H", f"Authorization: Bearer {token}"]
        said = subprocess.run([*curl, f"{url}/models/job"], capture_output=True, check=True).stdout  # noqa: S603
        assert json.loads(said)["id"] == "job"
        with openai.OpenAI(base_url=url, api_key=token, max_retries=0) as client:
            other = talk(client, url, token, model, start, address)
    assert codes == [1]
    assert not other.asked
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "private" not in error


def talk(client: openai.OpenAI, url: str, token: str, model: Model, start: Start, address: str) -> Model:
    reply = client.completions.create(model="job", prompt="red stop blue", max_tokens=400, stop=" STOP")
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == ("RED ", "stop")
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (3, 1)
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "why not?"}]
    sampling = {"temperature": 0.5, "top_p": 0.9, "seed": 7}
    chat = client.chat.completions.create(model="job", messages=messages, max_tokens=2, **sampling)
    assert chat.choices[0].message.content == "WHY NOT? "
    usage = {"stream_options": {"include_usage": True}}
    stream = client.chat.completions.create(model="job", messages=messages, stream=True, temperature=1, **usage)
    *chunks, last = stream
    assert [text for chunk in chunks if (text := chunk.choices[0].delta.content)] == ["WHY ", "NOT? "]
    usage = last.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 2, 5)  # tokens, not messages
    model.go.release()
    pieces = iter(client.completions.create(model="job", prompt="slowly red", stream=True))
    assert next(pieces).choices[0].text == "SLOWLY "  # it is here before the enclave has made the next
    model.go.release()
    assert next(pieces).choices[0].text == "RED "
    pieces.close()
    drawn = model.asked[2][2].pop("seed")
    assert 0 <= drawn < 1 << 63
    assert model.asked == [
        (5, "red stop blue", {"stop": [" STOP"]}),
        (2, messages, sampling),
        (5, messages, {"temperature": 1.0, "top_p": 1.0}),
        (5, "slowly red", {}),
    ]
    # Who leaves a stream has no more of it computed.
    model.go.release()
    with client.completions.create(model="job", prompt="slowly red", stream=True) as left:
        assert next(iter(left)).choices[0].text == "SLOWLY "
    assert model.left.wait(20)
    headers = {"Authorization": f"Bearer {token}"}
    about = httpx2.get(f"{url}/protection", headers=headers).json()
    assert about["attested"]["simulation"] and all(r["passed"] for r in about["attested"]["rules"])
    told = httpx2.get(f"{url}/job", headers=headers).json()
    assert told == {"status": "done", "step": 60, "steps": 60, "queries": 5, "max_queries": QUOTA}
    with pytest.raises(openai.BadRequestError, match="at most 8") as caught:
        client.completions.create(model="job", prompt="endless")
    assert (caught.value.code, caught.value.param) == (
        "context_length_exceeded",
        "prompt",
    )  # by which chat programs know that they must shorten it
    client.completions.create(model="job", prompt="more")
    with pytest.raises(openai.PermissionDeniedError, match="used up"):
        client.completions.create(model="job", prompt="more")
    # Another enclave at the address, though the policy accepts it too: nothing is sent, and it is over.
    model.stop()  # type: ignore[attr-defined]
    _, other = start(Identity.generate("other", "x25519"), address)
    with pytest.raises(openai.InternalServerError, match="not the one that was verified"):
        client.completions.create(model="job", prompt="private")
    return other


def test_a_connection_that_broke_is_asked_over_another(start: Start, files: list[str]) -> None:
    """The very same question, and of its answer only what the client has not got yet."""
    address, model = start(ENCLAVE)
    model.breaks = True
    again: list[Model] = []

    def restart() -> None:
        assert model.stopped.wait(30)  # type: ignore[attr-defined]
        again.append(start(ENCLAVE, address)[1])

    thread = threading.Thread(target=restart)
    thread.start()
    with (
        connected(address, files) as (url, token, _, codes),
        openai.OpenAI(base_url=url, api_key=token, max_retries=0) as client,
    ):
        chunks = list(
            client.completions.create(
                model="job",
                prompt="once broken twice",
                stream=True,
                temperature=1,
                stream_options={"include_usage": True},
            )
        )
        assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == "ONCE BROKEN TWICE "
        assert [c.usage.completion_tokens for c in chunks if c.usage] == [3]
        thread.join(30)
        assert again[0].asked == model.asked and len(model.asked) == 1
        again[0].stop()  # type: ignore[attr-defined]
        start(Identity.generate("other", "x25519"), address)
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model="job", prompt="x")
    assert codes == [1]


def test_an_enclave_that_is_away_is_told_and_one_that_changed_ends_it_without_a_request(
    start: Start, files: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("obfuscatune.serving.relay.RENEWAL_SECONDS", 0.05)
    monkeypatch.setattr("obfuscatune.serving.relay.AWAY_SECONDS", 0.05)
    address, model = start(ENCLAVE)
    with (
        connected(address, files) as (url, token, _, codes),
        openai.OpenAI(base_url=url, api_key=token, max_retries=0) as client,
    ):
        health = url.replace("/v1", "/health")

        def until(status: int) -> None:
            deadline = time.monotonic() + 20
            while httpx2.get(health).status_code != status:
                assert time.monotonic() < deadline
                threading.Event().wait(0.02)

        until(200)
        # A client that gave up asks again by itself: the very same question, which the enclave counts once.
        for tries in (2, 1):
            impatient = client.with_options(max_retries=tries - 1, timeout=1.5)  # enough to reach the enclave
            with pytest.raises(openai.APITimeoutError):
                impatient.completions.create(model="job", prompt="slowly red", temperature=1)
        seeds = [sampling["seed"] for _, _, sampling in model.asked]
        assert seeds[0] == seeds[1] != seeds[2]
        while model.told < 3:  # its evidence is renewed though nobody asks
            threading.Event().wait(0.02)
        model.stop()  # type: ignore[attr-defined]
        until(503)
        for behind in (nullcontext(), resetting(address)):
            with behind, pytest.raises(openai.InternalServerError) as caught:
                client.completions.create(model="job", prompt="x")
            assert (caught.value.status_code, caught.value.code) == (503, "unavailable")
            assert caught.value.response.headers["retry-after"] == "5"
        _, back = start(ENCLAVE, address)
        until(200)
        back.stop()  # type: ignore[attr-defined]
        until(503)
        _, other = start(Identity.generate("other", "x25519"), address)
    assert codes == [1] and not other.asked and not other.told
    assert "error: " in capsys.readouterr().err


def test_nothing_that_is_asked_or_answered_is_logged(
    start: Start, files: list[str], verbose: Callable[[], str], capfd: pytest.CaptureFixture[str]
) -> None:
    address, model = start(ENCLAVE)
    with connected(address, files) as (url, token, _, codes):

        def ask(path: str, **body: Any) -> httpx2.Response:
            content = {"model": "job", "max_tokens": 5, **body}
            return httpx2.post(f"{url}/{path}", headers={"Authorization": f"Bearer {token}"}, json=content, timeout=60)

        for stream in (False, True):
            reply = ask("completions", prompt="my quokka", stream=stream)
            assert reply.status_code == 200 and "QUOKKA" in reply.text
            messages = [{"role": "user", "content": "my quokka"}]
            assert ask("chat/completions", messages=messages, stream=stream).status_code == 200
        model.fails = True
        for stream in (False, True):
            reply = ask("completions", prompt="another quokka", stream=stream)
            assert "error" in reply.json() if not stream else '"error"' in reply.text
        model.stop()  # type: ignore[attr-defined]
        start(Identity.generate("other", "x25519"), address)
        assert ask("completions", prompt="last quokka").status_code == 503
    assert codes == [1]
    out, err = capfd.readouterr()
    assert "Executing <Handle" in verbose()
    assert "quokka" not in (verbose() + out + err).lower() and token not in verbose()


def test_an_enclave_that_is_refused_gets_no_port(
    start: Start, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    address, model = start(ENCLAVE)
    opened: list[Any] = []
    monkeypatch.setattr(socket, "create_server", lambda *args, **more: opened.append(args))
    policy = tmp_path / "policy.toml"
    good = policy.read_text()
    policy.write_text(good.replace(good.split('mrtd = ["')[1][:8], "00000000"))
    assert main(["connect", "--enclave", address, *files]) == 1
    assert "refused by the rule 'mrtd'" in capsys.readouterr().err
    policy.write_text(good)
    assert main(["connect", "--enclave", address, *[f for f in files if f != "--allow-simulation"]]) == 2
    assert "policy allows simulation" in capsys.readouterr().err
    (tmp_path / "clinic.key").write_bytes(LAB.to_bytes())
    assert main(["connect", "--enclave", address, *files]) == 1
    assert "the job gives this party no queries: got provider, expected owner" in capsys.readouterr().err
    assert not opened and not model.asked


def age(browser: Any) -> int:
    """Seconds since the enclave was verified, as the page says."""
    return int(by_id(browser, "attested").text.split("Verified ")[1].split(" s ago")[0])


def test_the_page_shows_what_was_verified_and_how_far_the_job_is(browser: Any, start: Start, files: list[str]) -> None:
    address, model = start(ENCLAVE)
    model.job = {"status": "<i>running</i>", "step": 20, "steps": 60, "loss": 1.25}
    with connected(address, files) as (url, token, _, codes):
        browser.get(f"{url.removesuffix('v1')}#token={token}")
        wait(browser, lambda: by_id(browser, "bar").get_property("value") == 20)
        assert by_id(browser, "bar").get_property("max") == 60
        assert by_id(browser, "status").text == f"<i>running</i>, 0 of {QUOTA} queries used"
        assert "1.25" not in browser.page_source  # an enclave that told a loss would not be repeated
        assert "accepted; SIMULATION" in by_id(browser, "attested").text
        assert by_id(browser, "workers").text == "none"  # all of it stays in the enclave
        assert "how long each question" in by_id(browser, "shown").text  # to the network
        by_id(browser, "verified").click()
        rules = by_id(browser, "rules").text.splitlines()
        assert len(rules) > 3 and all(line.startswith(("ok: ", "not judged: ")) for line in rules)
        assert any(line.startswith("ok: mrtd") for line in rules)
        assert "mrtd " in by_id(browser, "measurements").text
        by_id(browser, "prompt").send_keys("hello")
        by_id(browser, "send").click()
        wait(browser, lambda: is_ready(browser) and [text.strip() for text in answers(browser)] == ["HELLO"])
        model.job = {"status": "done", "step": 60, "steps": 60}
        wait(browser, lambda: by_id(browser, "bar").get_property("value") == 60)
        assert by_id(browser, "status").text == f"done, 1 of {QUOTA} queries used"
        wait(browser, lambda: age(browser) >= 4)  # not the age at which the page was opened
        by_id(browser, "prompt").send_keys("again" + Keys.ENTER)
        wait(browser, lambda: age(browser) < 4)  # it was verified anew for that
        # Another enclave at the address: the page says so, and the session is over.
        model.stop()  # type: ignore[attr-defined]
        _, other = start(Identity.generate("other", "x25519"), address)
        by_id(browser, "prompt").send_keys("private")
        by_id(browser, "send").click()
        wait(browser, lambda: by_id(browser, "error").text)
        assert "not the one that was verified" in by_id(browser, "error").text
        wait(browser, lambda: by_id(browser, "attested").text.startswith("NOT VERIFIED any more"))
        assert not by_id(browser, "verified").is_displayed()
        browser.get("about:blank")  # else its connection is waited for
    assert codes == [1] and not other.asked


@pytest.mark.slow  # it waits for an enclave to start and for the page to ask again
def test_the_page_finds_an_enclave_again_that_was_away(browser: Any, start: Start, files: list[str]) -> None:
    """The enclave is restarted while its job runs: the page goes on telling the steps, and nobody has to ask for it."""
    address, model = start(ENCLAVE)
    model.job = {"status": "running", "step": 20, "steps": 60}
    with connected(address, files) as (url, token, _, _):
        browser.get(f"{url.removesuffix('v1')}#token={token}")
        wait(browser, lambda: by_id(browser, "bar").get_property("value") == 20)
        model.stop()  # type: ignore[attr-defined]
        wait(browser, lambda: "no enclave answers" in by_id(browser, "status").text)
        _, again = start(ENCLAVE, address)
        again.job = {"status": "running", "step": 40, "steps": 60}
        wait(browser, lambda: by_id(browser, "bar").get_property("value") == 40)
        assert by_id(browser, "status").text == f"running, 0 of {QUOTA} queries used"
        browser.get("about:blank")  # else its connection is waited for
