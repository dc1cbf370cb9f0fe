"""A tiny model with two adapters, and servers of it in threads of the test's own process."""

import json
import shutil
import socket
import threading
from asyncio.base_events import BaseEventLoop
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from openai import OpenAI
from peft import LoraConfig, PeftModel, get_peft_model
from selenium import webdriver
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from obfuscatune.profiles import resolve
from obfuscatune.serving.app import build_app
from obfuscatune.serving.batcher import Batcher
from obfuscatune.serving.handlers import offer
from obfuscatune.serving.limits import ServerLimits
from obfuscatune.serving.metrics import Metrics
from obfuscatune.serving.models import ServedModel, serve_model
from obfuscatune.serving.server import Server, listen

TOKEN = "a-token-of-the-tests-alone"
TEMPLATE = (
    "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)
ADAPTERS = ("clinic", "lab")


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 96}
    model = GPT2LMHeadModel(
        GPT2Config(**sizes, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, bos_token_id=257, eos_token_id=256)
    )
    with torch.no_grad():  # far from ties, so that greedy tokens do not depend on the last bits
        for parameter in model.parameters():
            parameter.mul_(3)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture(scope="session")
def adapter_dirs(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found = {}
    for number, name in enumerate(ADAPTERS):
        torch.manual_seed(number + 1)
        model = AutoModelForCausalLM.from_pretrained(model_dir)
        config = LoraConfig(
            r=2 + number, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False
        )
        found[name] = str(tmp_path_factory.mktemp(name))
        get_peft_model(model, config).save_pretrained(found[name])
    return found


@pytest.fixture(scope="session")
def expect(model_dir: Path, adapter_dirs: dict[str, str], tokenizer: Any) -> Callable[..., str]:
    """What plain transformers completes greedily, alone, without padding."""
    plain = {"base": AutoModelForCausalLM.from_pretrained(model_dir).eval()}
    for name, path in adapter_dirs.items():
        plain[name] = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), path).eval()

    def expect(model: str, prompt: str | list[dict[str, str]], max_new_tokens: int) -> str:
        if isinstance(prompt, str):
            ids = tokenizer(prompt)["input_ids"]
        else:
            text = "".join(f"[{m['role'][0]}]{m['content']}<end>" for m in prompt) + "[a]"
            ids = tokenizer(text)["input_ids"]
        out = plain[model].generate(
            input_ids=torch.tensor([ids]), max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=256
        )
        return str(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))

    return expect


@dataclass(frozen=True)
class Running:
    """A server, and a client of it that does not try again by itself."""

    port: int
    batcher: Batcher
    openai: OpenAI
    leave: Callable[[], None]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str, token: str | None = TOKEN, **more: Any) -> httpx2.Response:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return httpx2.get(self.url + path, headers=headers, timeout=30, **more)

    def post(self, path: str, body: Any, token: str | None = TOKEN) -> httpx2.Response:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx2.post(self.url + path, headers=headers, content=content, timeout=60)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)


@contextmanager
def serving(
    served: ServedModel, limits: ServerLimits, *, tls: dict[str, str] | None = None, **changes: Any
) -> Iterator[Running]:
    """Serve in a thread, with the real uvicorn on a real socket; ``changes`` are of the offer."""
    metrics = Metrics()
    batcher = Batcher(served, limits, metrics)
    with listen("127.0.0.1", 0) as listener:
        offered = replace(offer(served, batcher, limits, metrics), **changes)
        app = build_app(offered, limits, metrics, tokens=[TOKEN], hosts=["127.0.0.1", "localhost"])
        server = Server(app, limits, give_up=batcher.stop, **(tls or {}))
        batcher.start(on_fault=server.leave)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        port = listener.getsockname()[1]
        try:
            with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=TOKEN, max_retries=0, timeout=60) as client:
                yield Running(port, batcher, client, server.leave)
        finally:
            server.leave()
            thread.join(60)
            batcher.close()
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def open_served(model_dir: Path, adapter_dirs: dict[str, str]) -> Iterator[Callable[[str], ServedModel]]:
    """Protect the model under a profile, once for all tests."""
    with ExitStack() as stack:
        found: dict[str, ServedModel] = {}

        def get(profile: str) -> ServedModel:
            if profile not in found:
                protection = {"profile": resolve(profile), "worker": ["spawn"], "threads": 1, "timeout": 60.0}
                context = serve_model(str(model_dir), "float32", adapter_dirs, protection, None)
                found[profile] = stack.enter_context(context)
            return found[profile]

        yield get


@pytest.fixture(scope="session")
def server(open_served: Callable[[str], ServedModel]) -> Iterator[Running]:
    """A server under ``balanced`` with the usual limits."""
    with serving(open_served("balanced"), ServerLimits()) as running:
        yield running


@pytest.fixture
def verbose(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """Everything is logged: also by asyncio in its debug mode, each call with its arguments; returns what was."""
    monkeypatch.setattr(BaseEventLoop, "set_debug", lambda self, on: setattr(self, "_debug", True))
    slow = property(lambda self: 0.0, lambda self, seconds: None)
    monkeypatch.setattr(BaseEventLoop, "slow_callback_duration", slow, raising=False)
    caplog.set_level(0)

    def logged() -> str:
        clients = ("openai", "httpx", "httpcore")
        return "\n".join(f"{r.name} {r.getMessage()}" for r in caplog.records if not r.name.startswith(clients))

    return logged


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()
