"""No private text in what a verb prints, logs, answers or writes, whichever library fails in whichever call.

A table of verbs and of calls of other libraries in them. Each call fails with the private text in its words, after it
has logged them as an error with its trace. The text is then looked for in all that came out.
"""

import importlib
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from obfuscatune import cli
from obfuscatune.cli import GROUPS, VERBS, foreign, main
from obfuscatune.parties.canonical import encode
from obfuscatune.parties.identity import Identity
from obfuscatune.parties.job import Job, SignedJob
from obfuscatune.parties.sealed.archive import seal_files
from obfuscatune.serving.refusal import Refusal
from obfuscatune.training import jsonl

CANARY = "zebra"
LAB, CLINIC, ENCLAVE = (Identity.generate(name, "x25519") for name in ("lab", "clinic", "enclave"))


class PanicError(BaseException):
    """As a panic of Rust, which is no ``Exception``."""


KINDS = (RuntimeError, ValueError, PanicError, OSError)
_TOKENIZER = "transformers:PreTrainedTokenizerFast"
_TEMPLATE = f"{_TOKENIZER}.apply_chat_template"
_MODEL = "transformers:GPT2LMHeadModel"
_JSON = "json:loads"

# Which calls fail in which verb. Where a library's call is one of many, the first of them fails.
TABLE = {
    "finetune": [
        f"{_TOKENIZER}._encode_plus",
        f"{_TOKENIZER}.from_pretrained",
        f"{_MODEL}.forward",
        "torch:Tensor.backward",
        "transformers:Trainer._save_checkpoint",
        "peft:get_peft_model",
        "peft.peft_model:safe_save_file",
        "peft:PeftModel.save_pretrained",
        _JSON,
    ],
    "finetune chats": [_TEMPLATE],
    "generate": [f"{_TOKENIZER}._encode_plus", f"{_TOKENIZER}.pad", f"{_MODEL}.generate", _JSON],
    "generate --prompt": [f"{_TOKENIZER}.decode", "torch:inference_mode"],
    "generate chats": [_TEMPLATE],
    "generate --job": ["Channel.request", _JSON],
    "evaluate": [
        f"{_TOKENIZER}._encode_plus",
        f"{_MODEL}.forward",
        "datasets:Dataset.from_list",
        "lm_eval.models.huggingface:HFLM._model_call",
        "lm_eval.api.task:ConfigurableTask.process_results",
        _JSON,
    ],
    "lm-eval": ["lm_eval.models.huggingface:HFLM._model_call"],
    "seal data": [_JSON, "obfuscatune.parties.sealed.keys:AESGCM"],
    "seal prompts": [_JSON],
    "seal model": ["transformers:AutoTokenizer.from_pretrained", "transformers:AutoConfig.from_pretrained"],
    "sealed open": ["obfuscatune.parties.sealed.keys:AESGCM"],
    "serve": [
        f"{_TOKENIZER}._encode_plus",
        f"{_TOKENIZER}.pad",
        f"{_TOKENIZER}.decode",
        f"{_MODEL}.forward",
        f"{_MODEL}.generate",
        _TEMPLATE,
        "transformers.cli.serving.completion:CompletionHandler._build_chunk_sse",
    ],
    "connect": ["Channel.stream", _JSON],
    "job fetch": ["Channel.request", "obfuscatune.parties.sealed.keys:AESGCM"],
    "party seal": [_JSON, "obfuscatune.parties.sealed.keys:AESGCM"],
    "audit": [f"{_TOKENIZER}._encode_plus"],
    "reproduce accuracy": [f"{_TOKENIZER}._encode_plus", _JSON],
    "reproduce conditioning": [f"{_TOKENIZER}._encode_plus", f"{_MODEL}.forward"],
}
ROWS = [(verb, call) for verb, calls in TABLE.items() for call in calls]
# transformers says in the words of an OSError which file or name there is not, and these are told. It reads JSON there.
TOLD = {(call, OSError) for _, call in ROWS if call.endswith("from_pretrained") or call == _JSON}


class Failure:
    """While it is entered a call fails, with the private text in its words; ``count``: how often it has."""

    def __init__(self, call: str, kind: type[BaseException]) -> None:
        self.call, self._kind, self._patch, self.count = call, kind, pytest.MonkeyPatch(), 0

    def __enter__(self) -> None:
        module, _, path = self.call.rpartition(":")
        owner: Any = importlib.import_module(module) if module else sys.modules[__name__]
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        self._patch.setattr(owner, name, self._fail)

    def __exit__(self, *_: object) -> None:
        self._patch.undo()

    def _fail(self, *arguments: Any, **named: Any) -> None:
        self.count += 1
        try:
            raise ValueError(CANARY)  # a chain of two, as libraries make them
        except ValueError as error:
            log = logging.getLogger("transformers.modeling")
            log.error("cannot take %s", CANARY, exc_info=True)
            log.warning("it says %s", error)
            raise self._kind(f"cannot take {CANARY!r}") from error


class Channel:
    """An enclave that has one result, and answers each prompt with itself."""

    enclave = ENCLAVE.public
    verdict = "accepted"

    def __init__(self, result: Path, digest: str) -> None:
        self._data, self._digest = result.read_bytes(), digest

    def request(self, fields: dict[str, Any], payload: bytes = b"", **_: Any) -> tuple[dict[str, Any], bytes]:
        if fields["op"] == "download":
            return {"size": len(self._data)}, self._data[fields["offset"] :]
        if fields["op"] == "generate":
            return {"prompt_tokens": [1], "completion_tokens": [1], "ended": [1]}, payload
        known = {"reason": "", "step": 1, "steps": 1, "missing": {}, "queries": 0, "workers": []}
        return {**known, "status": "done", "job": fields["job"], "results": {"output": self._digest}}, b""

    def stream(self, fields: dict[str, Any], payload: bytes = b"", **_: Any) -> Iterator[tuple[dict[str, Any], bytes]]:
        yield {"tokens": 1}, payload
        yield {"prompt_tokens": [1], "completion_tokens": [1], "ended": [1]}, b""

    def __enter__(self) -> "Channel":
        return self

    def __exit__(self, *_: object) -> None:
        return


ComeOut = Callable[..., tuple[int, str]]


@pytest.fixture
def lines(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[object]]:
    """The verbs' command lines, over files that hold the private text."""
    monkeypatch.chdir(tmp_path)
    inputs = tmp_path / "inputs"
    (inputs / "webqs").mkdir(parents=True)
    texts, chats, prompts, book = (inputs / name for name in ("texts", "chats", "prompts", "book"))
    row = {"prompt": CANARY, "completion": CANARY}
    turns = [{"role": role, "content": CANARY} for role in ("user", "assistant")]
    texts.write_text(json.dumps(row) + "\n")
    chats.write_text(json.dumps({"messages": turns}) + "\n")
    prompts.write_text(json.dumps({"prompt": CANARY}) + "\n")
    book.write_text(f"{CANARY} " * 70_000)
    for split in ("train", "validation"):
        question = {"id": split, "question": CANARY, "answers": [CANARY]}
        (inputs / "webqs" / f"{split}.jsonl").write_text(json.dumps(question) + "\n")
    template = inputs / "template"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (tmp_path / "policy.toml").touch()
    (tmp_path / "terms.toml").write_text(
        f'version = 3\npartners = ["{LAB.public.fingerprint}"]\nexpires = 2099-01-01\n'
    )
    for one in (LAB, CLINIC):
        key = tmp_path / f"{one.public.name}.key"
        key.write_bytes(one.to_bytes())
        key.chmod(0o600)
    for one in (LAB, ENCLAVE):
        (tmp_path / f"{one.public.name}.pub").write_bytes(encode(one.public.to_dict()))
    party = {"name": "clinic", "role": "owner", "enclave": "tls://127.0.0.1:1", "identity": "clinic.key"}
    party |= {"policy": "policy.toml", "terms": "terms.toml", "partner": "lab.pub"}
    (tmp_path / "party.toml").write_text("".join(f'{name} = "{value}"\n' for name, value in party.items()))
    owners = {"provider": LAB.public.fingerprint, "owner": CLINIC.public.fingerprint}
    sealed = {"model": "aa" * 32, "data": "bb" * 32, "enclave": ENCLAVE.public.fingerprint}
    queries: dict[str, Any] = {"queries_by": ("owner",), "max_queries": 9}
    job = SignedJob(Job(**owners, **sealed, **queries, expires=int(time.time()) + 3600)).sign(LAB).sign(CLINIC)
    (tmp_path / "job.json").write_bytes(job.to_bytes())
    files: dict[str, Path | bytes] = {"generations.jsonl": texts}
    digest = seal_files(inputs / "result", files, kind="output", sender=ENCLAVE, recipients=[CLINIC.public])
    channel = Channel(inputs / "result", digest)
    monkeypatch.setattr("obfuscatune.cli.connecting.load_policy", lambda *_: None)
    monkeypatch.setattr("obfuscatune.parties.reached.connect_attested", lambda *_, **__: channel)
    accepted = SimpleNamespace(require=lambda: SimpleNamespace(identity=ENCLAVE.public))
    monkeypatch.setattr("obfuscatune.parties.party.Party.verify", lambda _: accepted)
    monkeypatch.setattr("obfuscatune.training.chat._template", lambda tokenizer, where: "no marks")
    monkeypatch.setattr("lm_eval.utils.setup_logging", lambda: None)  # it keeps a standard error that is closed later

    model = ["--model_name_or_path", model_dir, "--profile", "enclave"]
    trained = [*model, "--max_steps", 1, "--output_dir", tmp_path / "out"]
    asked = ["--enclave", "tls://127.0.0.1:1", "--identity", "clinic.key", "--policy", "policy.toml"]
    sealing = ["--recipient", "enclave.pub", "--terms", "terms.toml", "--output", tmp_path / "out.sealed"]
    tasks = ["--data_dir", inputs]
    return {
        "finetune": ["finetune", *trained, "--train_file", texts],
        "finetune chats": ["finetune", *trained, "--train_file", chats],
        "generate": ["generate", *model, "--prompt_file", prompts, "--max_new_tokens", 1],
        "generate --prompt": ["generate", *model, "--prompt", CANARY, "--max_new_tokens", 1],
        "generate chats": ["generate", *model, "--chat", "--prompt", CANARY, "--max_new_tokens", 1],
        "generate --job": ["generate", "--job", "job.json", "--prompt", CANARY, *asked],
        "evaluate": ["evaluate", *model, "--task", "webqs", *tasks, "--output_file", tmp_path / "results"],
        "lm-eval": ["lm-eval", "--model_args", f"pretrained={model_dir},profile=enclave", "--tasks", "webqs", *tasks],
        "seal data": ["seal", "data", texts, "--identity", "clinic.key", *sealing],
        "seal prompts": ["seal", "prompts", prompts, "--identity", "clinic.key", *sealing],
        "seal model": ["seal", "model", model_dir, "--identity", "lab.key", *sealing],
        "sealed open": ["sealed", "open", inputs / "result", "--identity", "clinic.key", "--output_dir", "opened"],
        "serve": ["serve", *model, "--chat_template", template, "--port", 0, "--max_new_tokens", 1],
        "connect": ["connect", "--job", "job.json", "--port", 0, *asked],
        "job fetch": ["job", "fetch", "job.json", "--output_dir", "results", *asked],
        "audit": ["audit", "--text_file", book, "--out", "audit", "--model", "tiny"],
        "party seal": ["party", "seal", "--data", texts],
        "reproduce accuracy": [
            *("reproduce", "accuracy", "--preset", "tiny", "--output_dir", "study", "--tasks", "webqs", *tasks),
            *("--model_name_or_path", model_dir, "--methods", "unprotected"),
        ],
        "reproduce conditioning": [
            *("reproduce", "conditioning", "--preset", "tiny", "--output_dir", "study"),
            *("--model_name_or_path", model_dir, "--text_file", book),
        ],
    }


@pytest.fixture
def come_out(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ComeOut:
    """Run a command line, ask it over HTTP where it serves, and return its exit code and all that has come out."""
    servers: list[Any] = []

    def come_out(line: list[object], failure: AbstractContextManager[Any], *, chat: bool = False) -> tuple[int, str]:
        capfd.readouterr()
        words = [str(word) for word in line]
        if words[0] not in ("serve", "connect"):
            with failure:
                code = main(words)
            answers = ""
        else:
            code, answers = asked(words, failure, chat=chat)
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        # What was given is no output, nor is the audit's copy of the text that it is to learn.
        inputs, copy = tmp_path / "inputs", tmp_path / "audit" / "fixtures" / "text.txt"
        written = [path for path in tmp_path.rglob("*") if path.is_file() and inputs not in path.parents]
        files = "".join(path.read_bytes().decode("latin-1") for path in written if path != copy)
        return code, f"{out}\n{err}\n{answers}\n{files}"

    def asked(words: list[str], failure: AbstractContextManager[Any], *, chat: bool) -> tuple[int, str]:
        codes: list[int] = []
        said: list[str] = []  # not of `capfd`, which loses what is written while it reads

        def tell(line: object, **_: object) -> None:
            said.append(str(line))

        monkeypatch.setattr("obfuscatune.cli.serve.print", tell, raising=False)
        thread = threading.Thread(target=lambda: codes.append(main(words)), daemon=True)
        thread.start()
        while not said or not said[-1].startswith("page: "):
            assert thread.is_alive()
            thread.join(0.02)
        url, token, name = said[-3].split()[-1], said[-2].split()[-1], said[-3].split()[1]
        path, text = (
            ("chat/", {"messages": [{"role": "user", "content": CANARY}]}) if chat else ("", {"prompt": CANARY})
        )
        headers, answers = {"Authorization": f"Bearer {token}"}, ""
        with failure:
            for stream in (False, True):
                body = {"model": name, "stream": stream, **text}
                try:
                    reply = httpx2.post(f"{url}/{path}completions", headers=headers, json=body, timeout=60)
                except httpx2.HTTPError:  # a stream that has begun is cut, and after a panic the server ends
                    continue
                answers += f"{reply.status_code} {reply.headers} {reply.text}\n"
        servers[-1].leave()
        thread.join(60)
        assert not thread.is_alive()
        return codes[0], "\n".join(said) + answers

    from obfuscatune.serving.server import Server

    made = Server.__init__

    def make(self: Any, *arguments: Any, **named: Any) -> None:
        made(self, *arguments, **named)
        servers.append(self)

    monkeypatch.setattr(Server, "__init__", make)
    return come_out


def check(verb: str, failure: Failure, lines: dict[str, list[object]], come_out: ComeOut) -> None:
    code, text = come_out(lines[verb], failure, chat=failure.call == _TEMPLATE)
    assert failure.count, f"{verb} does not call {failure.call}"
    assert CANARY not in text
    assert code in (1, 2) or verb in ("serve", "connect"), text


def kinds(number: int, call: str) -> list[type[BaseException]]:
    """The ways in which a call of the table fails, another one first in each row."""
    first = number % len(KINDS)
    return [kind for kind in KINDS[first:] + KINDS[:first] if (call, kind) not in TOLD]


@pytest.mark.parametrize(
    ("number", "verb", "call"),
    [  # the harness' own command line reads thousands of files first
        pytest.param(number, *row, marks=pytest.mark.slow if row[0] == "lm-eval" else ())
        for number, row in enumerate(ROWS)
    ],
)
def test_a_failing_call_is_told_without_its_words(number: int, verb: str, call: str, lines, come_out) -> None:
    check(verb, Failure(call, kinds(number, call)[0]), lines, come_out)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "verb", "call"), [(number, *row) for number, row in enumerate(ROWS) if row[0] != "lm-eval"]
)
def test_so_it_is_where_it_fails_in_another_way(number: int, verb: str, call: str, lines, come_out) -> None:
    check(verb, Failure(call, kinds(number, call)[2]), lines, come_out)


def test_the_verbs_of_the_table_are_all_that_take_private_text(lines) -> None:
    groups = ("party", "identity", "attest", "log", "enclave", "sealed", "seal", "job", "reproduce")
    known = {line[0] for line in lines.values()}
    without = {"demo", "worker", "inspect", "doctor", "bench"}  # invented rows, numbers, no text at all
    assert {*VERBS} - known == without and {*GROUPS} == {*groups}


@pytest.mark.parametrize(
    ("verb", "call"), [("generate", f"{_MODEL}.generate"), ("serve", f"{_MODEL}.generate"), ("evaluate", _JSON)]
)
def test_the_search_finds_words_that_are_told(
    verb: str, call: str, lines, come_out, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same search, with the words let through: in an error, in a log, in an answer."""
    monkeypatch.setattr(cli, "without_content", str)
    monkeypatch.setattr(foreign, "_without_words", lambda record: record)
    monkeypatch.setattr(jsonl, "DataError", lambda *_, **__: RuntimeError(CANARY))
    monkeypatch.setattr("obfuscatune.serving.refusal.Refusal.internal", lambda: Refusal(500, CANARY, code="x"))
    _, text = come_out(lines[verb], Failure(call, RuntimeError))
    assert CANARY in text


def test_the_control_prints_what_it_was_asked_for(lines, come_out) -> None:
    code, text = come_out(lines["generate"], nullcontext())
    assert code == 0 and CANARY not in text
