"""Requests of parties that may be hostile: types, sizes, jobs and results of others, queries of those who have left."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from obfuscatune.errors import (
    BusyError,
    ConsentError,
    FormatError,
    ObfuscatuneError,
    ProtocolError,
    SealError,
    UsageError,
    WorkerFault,
)
from obfuscatune.parties.enclave import Status
from obfuscatune.parties.job import Job
from obfuscatune.service.queries import MAX_PROMPT_BYTES, Query
from obfuscatune.service.requests import MAX_WAITING
from obfuscatune.serving.sampling import Settings
from obfuscatune.training.completion import Completion

from .jobs import CANARY, CLINIC, LAB, STRANGER, Enclave, job_fields, open_enclave, sign
from .platforms import new_platform

OPERATIONS = ["submit", "resume_upload", "upload", "status", "download", "log", "generate", "list", "cancel", "delete"]
OF_A_JOB = [name for name in OPERATIONS if name not in ("submit", "log", "list")]
PROMPTS = json.dumps(["the colour is"]).encode()
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 1 << 64) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@pytest.fixture
def enclave(tmp_path: Path) -> Iterator[Enclave]:
    with open_enclave(tmp_path) as opened:
        yield opened


def ask(enclave: Enclave, party: Any, op: str, payload: bytes = b"", **fields: Any) -> tuple[dict[str, Any], bytes]:
    return ask_in_parts(enclave, party, op, payload, **fields)[-1]


def ask_in_parts(enclave: Enclave, party: Any, op: str, payload: bytes = b"", **fields: Any) -> list[Any]:
    found = enclave.requests.handle(party.public, {"op": op, **fields}, payload)
    if isinstance(found, tuple):
        return [found]
    parts: list[Any] = []
    while True:
        try:
            part = next(found)
        except StopIteration as end:
            return [*parts, end.value]
        parts += [] if part is None else [part]


class Answering:
    """The thread that has the model, which answers what ``ask`` hands over."""

    def __init__(self, enclave: Enclave, answer: Callable[[Query], None]) -> None:
        self.enclave, self.answer = enclave, answer
        enclave.requests._ask = self.take  # type: ignore[method-assign]

    def take(self, query: Query) -> None:
        self.enclave.queries.append(query)

        def work() -> None:
            try:
                if query.take():
                    self.answer(query)
            except Exception as error:
                query.fail(error)

        threading.Thread(target=work).start()


def test_from_the_job_to_the_results(enclave: Enclave) -> None:
    model, model_path = enclave.seal("model")
    data, data_path = enclave.seal("data")
    signed = enclave.signed_job(model=model, data=data, prompts=None)
    job = signed.job.digest
    told, _ = ask(enclave, LAB, "submit", signed.to_bytes())
    assert told["status"] == "waiting" and told["missing"] == {"model": model, "data": data}
    for party, digest, path in ((LAB, model, model_path), (CLINIC, data, data_path)):
        content, size = path.read_bytes(), path.stat().st_size
        assert ask(enclave, party, "resume_upload", job=job, file=digest, size=size)[0] == {"offset": 0}
        half = content[:1000]
        ask(enclave, party, "upload", half, job=job, file=digest, size=size, offset=0)
        assert ask(enclave, party, "resume_upload", job=job, file=digest, size=size)[0] == {"offset": 1000}
        ask(enclave, party, "upload", content[1000:], job=job, file=digest, size=size, offset=1000)
    assert ask(enclave, CLINIC, "status", job=job)[0]["status"] == "queued"
    assert enclave.told() == ["submitted", "input", "input", "queued"]
    enclave.book.next()
    adapter = enclave.result("adapter")
    enclave.book.finished(job, {"adapter": adapter})
    told, _ = ask(enclave, CLINIC, "status", job=job)
    assert told["status"] == "done" and told["results"] == {"adapter": adapter}
    for _ in range(2):
        reply, piece = ask(enclave, CLINIC, "download", job=job, kind="adapter", offset=0)
        assert piece == enclave.book.store.path(adapter).read_bytes() and reply == {"size": len(piece)}
    assert enclave.told()[-2:] == ["done", "fetched"]  # once
    head, lines = ask(enclave, LAB, "log", start=0)
    assert head["head"]["length"] == len(lines.splitlines()) == enclave.log.length


@pytest.mark.parametrize("op", OF_A_JOB)
def test_a_job_of_others_is_as_one_that_is_not_there(enclave: Enclave, op: str) -> None:
    job = enclave.done_job()
    told = []
    for digest in (job, "00" * 32, "x" * 100_000, None, 7, [], {}):
        with pytest.raises(UsageError) as caught:
            ask(enclave, STRANGER, op, PROMPTS, job=digest, kind="adapter", offset=0, max_new_tokens=1)
        told.append(str(caught.value))
    assert len(set(told)) == 1
    assert op == "generate" or "no such job" in told[0]


def test_only_its_parties_submit_a_job(enclave: Enclave) -> None:
    with pytest.raises(ConsentError, match="other parties"):
        ask(enclave, STRANGER, "submit", enclave.signed_job().to_bytes())
    with pytest.raises(ConsentError, match="not signed by both"):
        ask(enclave, LAB, "submit", sign(enclave.signed_job().job, LAB).to_bytes())
    with pytest.raises(ConsentError, match="another enclave"):
        ask(enclave, LAB, "submit", sign(Job(**job_fields())).to_bytes())
    assert enclave.told() == ["refused", "refused"]


def test_only_what_is_owed_is_stored(enclave: Enclave) -> None:
    signed = enclave.signed_job(stored=False)
    job, inputs = signed.job.digest, signed.job.inputs
    enclave.submit(signed)
    foreign = [(CLINIC, inputs["model"]), (LAB, inputs["data"]), (LAB, inputs["prompts"]), (LAB, "00" * 32)]
    for party, file in [*foreign, *[(LAB, wrong) for wrong in (None, 7, [], "../x")]]:
        for op in ("upload", "resume_upload"):
            with pytest.raises(ConsentError, match="not an input that this party owes"):
                ask(enclave, party, op, b"x", job=job, file=file, size=1, offset=0)
    for size in (0, -1, True, 1.0, None, (1 << 20) + 1, 1 << 63):
        with pytest.raises(UsageError, match="size of an upload"):
            ask(enclave, LAB, "resume_upload", job=job, file=inputs["model"], size=size)
    for offset in (-1, 2, True, None, 1 << 64):
        with pytest.raises((UsageError, ProtocolError)):
            ask(enclave, LAB, "upload", b"xx", job=job, file=inputs["model"], size=2, offset=offset)
    assert not list(enclave.book.store.directory.glob("*.sealed"))


@pytest.mark.parametrize("torn", [False, True])
def test_an_upload_that_was_not_taken_in_is_when_it_goes_on(tmp_path: Path, torn: bool) -> None:
    """All pieces are there, and the enclave is killed, or its disk is full, before they have become a file."""
    platform = new_platform()
    with open_enclave(tmp_path, platform) as enclave:
        model, path = enclave.seal("model")
        job = enclave.submit(enclave.signed_job(model=model))
        content = path.read_bytes()
        fields = {"job": job, "file": model, "size": len(content)}
        written = content[:-1] + bytes(1) if torn else content  # as a machine that lost power may leave it
        enclave.book.store.begin(model, len(content), LAB.public.fingerprint).write(0, written)
    with open_enclave(tmp_path, platform) as enclave:
        offset = ask(enclave, LAB, "resume_upload", **fields)[0]["offset"]
        assert offset == (0 if torn else len(content))
        if torn:
            ask(enclave, LAB, "upload", content, offset=0, **fields)
        assert ask(enclave, LAB, "status", job=job)[0]["status"] == "queued"
        assert enclave.told()[-2:] == ["input", "queued"]


def test_nothing_is_owed_to_a_job_that_waits_no_longer(enclave: Enclave) -> None:
    job = enclave.done_job()
    model = enclave.book.signed(job).job.model
    for _ in range(2):
        with pytest.raises(ConsentError, match="not an input that this party owes"):
            ask(enclave, LAB, "resume_upload", job=job, file=model, size=10)
        enclave.book.store.remove(model)


def test_another_file_than_the_job_names_is_not_kept(enclave: Enclave) -> None:
    signed = enclave.signed_job(stored=False)
    job = enclave.submit(signed)
    _, path = enclave.seal("model")
    content = path.read_bytes()
    with pytest.raises(SealError, match="another file"):
        ask(enclave, LAB, "upload", content, job=job, file=signed.job.model, size=len(content), offset=0)
    assert enclave.book.missing(job) == signed.job.inputs and enclave.told() == ["submitted"]


def test_results_are_for_whom_the_job_names(enclave: Enclave) -> None:
    job = enclave.done_job(adapter_to=("owner",), generations_to=("provider",))
    for party, kind in ((LAB, "adapter"), (CLINIC, "output")):
        assert kind not in ask(enclave, party, "status", job=job)[0]["results"]
        with pytest.raises(ConsentError, match="no such result"):
            ask(enclave, party, "download", job=job, kind=kind, offset=0)
    for kind in (None, 7, [], {}, "checkpoint", "model"):
        with pytest.raises(ConsentError, match="no such result"):
            ask(enclave, CLINIC, "download", job=job, kind=kind, offset=0)
    for offset in (None, -1, True, 1 << 40, "0"):
        with pytest.raises(UsageError, match="offset"):
            ask(enclave, CLINIC, "download", job=job, kind="adapter", offset=offset)
    assert ask(enclave, LAB, "download", job=job, kind="output", offset=0)[1]


def test_a_query(enclave: Enclave) -> None:
    def answer(query: Query) -> None:
        query.finish([Completion(str(prompt).upper(), 2, 1, True) for prompt in query.prompts])

    Answering(enclave, answer)
    job = enclave.done_job()
    messages = [{"role": "user", "content": "b"}]
    prompts = json.dumps(["a é", CANARY, messages]).encode()
    fields, payload = ask(enclave, CLINIC, "generate", prompts, job=job, max_new_tokens=5)
    assert json.loads(payload) == ["A É", CANARY.upper(), "(('USER', 'B'),)"]
    assert fields == {"prompt_tokens": [2] * 3, "completion_tokens": [1] * 3, "ended": [1] * 3}
    assert "Zebediah" not in repr(enclave.queries[0])
    assert "Zebediah" not in repr(enclave.queries[0].completions)


def test_queries_that_the_job_does_not_give(enclave: Enclave, monkeypatch: pytest.MonkeyPatch) -> None:
    job, waiting = enclave.done_job(), enclave.submit(enclave.signed_job())
    with pytest.raises(UsageError, match="not done"):
        ask(enclave, CLINIC, "generate", PROMPTS, job=waiting, max_new_tokens=1)
    with pytest.raises(ConsentError, match="no queries"):
        ask(enclave, LAB, "generate", PROMPTS, job=job, max_new_tokens=1)
    with pytest.raises(ConsentError, match="longer"):
        ask(enclave, CLINIC, "generate", PROMPTS, job=job, max_new_tokens=33)
    with pytest.raises(ConsentError, match="used up"):
        ask(enclave, CLINIC, "generate", json.dumps(["x"] * 11).encode(), job=job, max_new_tokens=1)
    for tokens in (0, -1, True, 1.0, None, 65_537, "1"):
        with pytest.raises(UsageError, match="max_new_tokens"):
            ask(enclave, CLINIC, "generate", PROMPTS, job=job, max_new_tokens=tokens)
    for wait in (0, -1, True, None, "1", float("inf"), float("nan")):
        with pytest.raises(UsageError, match="wait"):
            ask(enclave, CLINIC, "generate", PROMPTS, job=job, max_new_tokens=1, wait=wait)
    expires = enclave.book.signed(job).job.expires
    monkeypatch.setattr("obfuscatune.service.book.time.time", lambda: expires)
    with pytest.raises(ConsentError, match="expired"):
        ask(enclave, CLINIC, "generate", PROMPTS, job=job, max_new_tokens=1)
    assert enclave.queries == [] and enclave.book.record(job).queries == 0


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b"{}",
        b'"x"',
        b"[1]",
        b'[""]',
        b'["", "x"]',
        b'["x", null]',
        b'["\\ud800 half a pair"]',
        b"[[]]",
        b'[["x"]]',
        b'[[{"role": "user"}]]',
        b'[[{"role": "tool", "content": "x"}]]',
        b'[[{"role": "user", "content": ""}]]',
        b'[[{"role": "user", "content": "x", "name": "y"}]]',
        b'["\xed\xa0\x80"]',
        '["x"]'.encode("utf-16"),
        b"[" * 100_000,
        b"[" + b"9" * 5000 + b"]",
        json.dumps(["x"] * 257).encode(),
        json.dumps([CANARY] * 300).encode()[:-1],
        b'["' + b"x" * MAX_PROMPT_BYTES + b'"]',
    ],
    ids=range(22),
)
def test_prompts_of_a_wrong_form(enclave: Enclave, payload: bytes) -> None:
    job = enclave.done_job()
    with pytest.raises(FormatError) as caught:
        ask(enclave, CLINIC, "generate", payload, job=job, max_new_tokens=1)
    assert "Zebediah" not in str(caught.value) and caught.value.__context__ is None
    assert enclave.queries == [] and enclave.book.record(job).queries == 0


def test_of_a_failure_the_class_only(enclave: Enclave) -> None:
    """The model is the provider's, who asks is the owner: its names are not for the other."""
    job = enclave.done_job()
    errors = [
        ValueError(CANARY),
        UsageError(CANARY, where="model.safetensors"),
        FormatError(f"sealed file /secret/{CANARY}"),
        SealError("x", got=CANARY),
    ]
    for error in errors:

        def fail(query: Query, error: Exception = error) -> None:
            raise error

        Answering(enclave, fail)
        with pytest.raises(ObfuscatuneError) as caught:
            ask(enclave, CLINIC, "generate", PROMPTS, job=job, max_new_tokens=1)
        assert str(caught.value) == f"the query failed in the enclave: got {type(error).__name__}"
    for told in (UsageError("prompt is too long", where="prompt 3"), ConsentError("queries of the job are used up")):

        def refuse(query: Query, error: Exception = told) -> None:
            raise error

        Answering(enclave, refuse)
        with pytest.raises(type(told), match=told.what):
            ask(enclave, CLINIC, "generate", PROMPTS, job=job, max_new_tokens=1)


def test_a_query_whose_client_has_gone_is_dropped(enclave: Enclave) -> None:
    job = enclave.done_job()
    with pytest.raises(ObfuscatuneError, match="busy"):
        ask(enclave, CLINIC, "generate", PROMPTS, job=job, max_new_tokens=1, wait=0.01)
    (query,) = enclave.queries
    assert query.prompts == [] and not query.take() and not query.left
    assert enclave.book.record(job).queries == 0


def test_a_stream(enclave: Enclave, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces as they come, joined where the client is slow; one that leaves is given up, and its place is free."""
    monkeypatch.setattr("obfuscatune.service.requests.LOOK_SECONDS", 0.01)
    given = threading.Semaphore(0)

    def answer(query: Query) -> None:
        for number, piece in enumerate(("a ", "\u00e9", " c"), 1):
            assert given.acquire(timeout=30)
            query.show(piece, number)
        query.finish([Completion("a \u00e9 c!", 2, 4, False)])

    Answering(enclave, answer)
    job = enclave.done_job()
    more = {"job": job, "max_new_tokens": 5, "stream": 1}
    parts = enclave.requests.handle(CLINIC.public, {"op": "generate", **more}, PROMPTS)
    assert not isinstance(parts, tuple)
    given.release()
    assert next(part for part in parts if part is not None) == ({"tokens": 1}, b"a ")
    given.release(2)
    assert enclave.queries[0].wait(30)
    with pytest.raises(StopIteration) as end:
        while True:
            next(parts)
    assert end.value.value == (
        {"prompt_tokens": [2], "completion_tokens": [4], "ended": [0]},
        "\u00e9 c!".encode(),
    )
    for _ in range(MAX_WAITING + 1):
        parts = enclave.requests.handle(CLINIC.public, {"op": "generate", **more}, PROMPTS)
        assert not isinstance(parts, tuple)
        assert next(parts) is None  # nothing for a while
        parts.close()
        assert enclave.queries[-1].left
        given.release(3)
        assert enclave.queries[-1].wait(30)
    with pytest.raises(UsageError, match="several prompts"):
        ask(enclave, CLINIC, "generate", b'["a", "b"]', **more)
    for stream in (True, 2, -1, "1", None):
        with pytest.raises(UsageError, match="stream"):
            ask(enclave, CLINIC, "generate", PROMPTS, **{**more, "stream": stream})


def test_sampling_of_a_wrong_form(enclave: Enclave) -> None:
    job = enclave.done_job()
    for sampling, fault in (
        (1, "other fields"),
        ({"top_k": 1}, "other fields"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": 1}, "without a seed"),
        ({"temperature": 2.5, "seed": 1}, "temperature"),
        ({"temperature": 1, "seed": 1 << 63}, "seed"),
        ({"temperature": 1, "seed": 1.5}, "seed"),
        ({"top_p": -0.1}, "top_p"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 5}, "stop"),
        ({"stop": "x" * 65}, "stop"),
        ({"stop": {CANARY: 1}}, "stop"),
    ):
        with pytest.raises(UsageError, match=fault) as caught:
            ask(enclave, CLINIC, "generate", PROMPTS, job=job, max_new_tokens=1, sampling=sampling)
        assert "Zebediah" not in str(caught.value)
    assert enclave.queries == []


def test_all_that_decides_an_answer_is_its_question() -> None:
    def question(prompt: str = "x", **chosen: Any) -> str:
        return Query("ab" * 32, "cd" * 32, [prompt], Settings(**{"longest": 2, **chosen})).question

    sampled = {"temperature": 0.5, "seed": 1}
    different = [{}, {"longest": 3}, {"stop": ("a",)}, sampled, {**sampled, "seed": 2}, {**sampled, "top_p": 0.5}]
    assert len({question(**chosen) for chosen in different} | {question("y")}) == len(different) + 1
    assert question(seed=3) == question()  # greedy


def test_a_query_that_is_being_answered_keeps_its_prompts() -> None:
    query = Query("ab" * 32, "cd" * 32, ["x"], Settings(longest=1))
    assert query.take()
    query.drop()
    assert query.prompts == ["x"]


def test_a_party_has_few_queries_at_a_time(tmp_path: Path) -> None:
    with open_enclave(tmp_path) as enclave:
        job = enclave.done_job(queries_by=("provider", "owner"))
        arrived = threading.Semaphore(0)
        take = enclave.queries.append

        def hold(query: Query) -> None:
            take(query)
            arrived.release()

        enclave.requests._ask = hold  # type: ignore[method-assign]

        def one(party: Any) -> threading.Thread:
            thread = threading.Thread(
                target=lambda: ask(enclave, party, "generate", PROMPTS, job=job, max_new_tokens=1)
            )
            thread.start()
            assert arrived.acquire(timeout=30)
            return thread

        threads = [one(CLINIC) for _ in range(MAX_WAITING)]
        with pytest.raises(BusyError, match="too many queries"):
            ask(enclave, CLINIC, "generate", PROMPTS, job=job, max_new_tokens=1)
        threads.append(one(LAB))  # the other party has places of its own
        for query in enclave.queries:
            query.finish([])
        for thread in threads:
            thread.join()
        threads = [one(CLINIC)]  # and a place is free again
        enclave.queries[-1].finish([])
        threads[0].join()


@pytest.mark.parametrize("start", [None, -1, True, 1.0, "0", 99])
def test_a_log_from_nowhere(enclave: Enclave, start: Any) -> None:
    with pytest.raises((ProtocolError, UsageError)):
        ask(enclave, LAB, "log", start=start)


@pytest.mark.parametrize("op", [None, 7, [], {}, "", "handle", "_submit", "__class__"])
def test_an_unknown_operation(enclave: Enclave, op: Any) -> None:
    with pytest.raises(ProtocolError, match="unknown operation"):
        enclave.requests.handle(LAB.public, {"op": op}, b"")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Enclave, list[Any]]]:
    with open_enclave(tmp_path_factory.mktemp("served"), wait=0.001) as opened:
        waiting = opened.submit(opened.signed_job(stored=False))
        yield opened, [waiting, opened.done_job()]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.sampled_from(OPERATIONS), st.sampled_from([LAB, CLINIC, STRANGER]), st.binary(max_size=30))
def test_arbitrary_requests(
    served: tuple[Enclave, list[Any]], data: st.DataObject, op: str, party: Any, payload: bytes
) -> None:
    enclave, jobs = served
    job = enclave.book.signed(jobs[0]).job
    known = {
        "job": st.sampled_from(jobs),
        "file": st.sampled_from([job.model, job.data]),
        "kind": st.sampled_from(["adapter", "output"]),
        "size": st.integers(1, 40),
        "offset": st.integers(0, 40),
        "start": st.integers(0, 3),
        "max_new_tokens": st.integers(1, 3),
    }
    fields = data.draw(st.fixed_dictionaries({}, optional={name: right | values for name, right in known.items()}))
    payload = data.draw(st.sampled_from([payload, PROMPTS, enclave.book.signed(jobs[0]).to_bytes()]))
    try:
        reply, _ = ask(enclave, party, op, payload, **fields)
    except ObfuscatuneError:
        return
    assert isinstance(reply, dict)


def test_a_job_whose_worker_crashed_goes_on_when_it_is_submitted_again(enclave: Enclave) -> None:
    """One command, and what it says: `obfuscatune job submit`."""
    signed = enclave.signed_job()
    job = enclave.submit(signed)
    enclave.book.next()
    enclave.book.checkpointed(job, 7, enclave.result("checkpoint"))
    enclave.book.progress(job, 9, 20)
    enclave.book.failed(job, WorkerFault("the worker is gone", worker="spawn", layer="h.0", call=3))
    told = ask(enclave, CLINIC, "status", job=job)[0]
    assert (told["status"], told["reason"], told["resumes_from"]) == ("failed", "WorkerFault", 7)
    assert str(Status.from_dict(told)).endswith("hint: obfuscatune job submit, once more, goes on from step 7")
    told = ask(enclave, CLINIC, "submit", signed.to_bytes())[0]
    assert str(Status.from_dict(told)).endswith("queued  step 9 of 20  goes on from step 7")
    assert enclave.events()[-2].details == {"step": 7}
    enclave.book.next()
    assert ask(enclave, CLINIC, "status", job=job)[0]["resumes_from"] == 0
