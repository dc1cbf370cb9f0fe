"""The service's loop: one job or one query may fail in any way, and the next is served."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import decoders

from obfuscatune.errors import UsageError
from obfuscatune.parties.identity import Identity
from obfuscatune.service.answers import MAX_ANSWERS, MAX_CHARACTERS, Answers
from obfuscatune.service.requests import Query
from obfuscatune.service.serve import Service
from obfuscatune.training.completion import Completion

from .jobs import CLINIC, LAB, Enclave, open_enclave

RED = Completion("red", 3, 1, True)


class Server:
    """A server that nobody connects to."""

    address = "tls://nowhere:1"

    def serve_forever(self) -> None:
        return

    def close(self) -> None:
        return


class FakeRunner:
    """Does what it is told to instead of a job or an answer; ``check`` refuses one prompt."""

    kept: str | None = None

    def __init__(self, act: Callable[[], Any]) -> None:
        self.act = act
        self.closed = 0

    def run(self, *_: Any) -> dict[str, str]:
        self.act()
        return {}

    def check(self, signed: Any, adapter: str, prompts: list[str], tokens: int) -> None:
        if "too long" in prompts:
            raise UsageError("prompt is too long for the model", where="prompt 1")

    def answer(self, *_: Any) -> list[Completion]:
        self.act()
        return [RED]

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def enclave(tmp_path: Path) -> Iterator[Enclave]:
    with open_enclave(tmp_path) as opened:
        yield opened


def service(enclave: Enclave, act: Callable[[], Any]) -> Service:
    return Service(enclave.book, FakeRunner(act), lambda _: Server(), max_file_bytes=1 << 20)  # type: ignore[arg-type, return-value]


def panic() -> None:
    """What a sealed tokenizer can make happen in Rust: a PanicException, which is no Exception."""
    decoders.Strip("h", 10, 10).decode(["h"])


def fail() -> None:
    raise MemoryError


def test_panic_is_no_exception(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BaseException) as caught:
        panic()
    assert not isinstance(caught.value, Exception)
    assert "panicked" in capfd.readouterr().err  # why `enclave serve` keeps native code from the terminal


@pytest.mark.parametrize("act", [panic, fail])
def test_a_job_that_fails_in_any_way_does_not_end_the_service(enclave: Enclave, act: Callable[[], None]) -> None:
    jobs = [enclave.submit(enclave.signed_job()) for _ in range(2)]
    ran: list[None] = []

    def run() -> None:
        ran.append(None)
        if len(ran) == 2:
            serving.stop()
        act()

    serving = service(enclave, run)
    serving.work()
    assert [enclave.book.record(job).status for job in jobs] == ["failed", "failed"]


@contextmanager
def working(serving: Service) -> Iterator[None]:
    thread = threading.Thread(target=serving.work)
    thread.start()
    try:
        yield
    finally:
        serving.stop()
        thread.join(30)
        assert not thread.is_alive()


def ask(serving: Service, job: str, prompt: str, party: Identity = CLINIC) -> Query:
    query = Query(job, party.public.fingerprint, [prompt], 1)
    serving._ask(query)
    assert query.done.wait(30)
    return query


@pytest.mark.parametrize("act", [panic, fail])
def test_a_query_that_fails_in_any_way_is_answered_and_given_back(tmp_path: Path, act: Callable[[], None]) -> None:
    with open_enclave(tmp_path) as enclave:
        job = enclave.done_job()
        serving = service(enclave, act)
        with working(serving):
            query = ask(serving, job, "the colour is")
        assert query.error is not None and not query.completions
        assert enclave.book.record(job).queries == 0
        platform = enclave.platform
    with open_enclave(tmp_path, platform) as enclave:
        assert enclave.book.record(job).queries == 0


def test_a_prompt_that_is_refused_costs_nothing_and_leaves_the_model(enclave: Enclave) -> None:
    job = enclave.done_job()
    serving = service(enclave, lambda: None)
    with working(serving):
        query = ask(serving, job, "too long")
        assert isinstance(query.error, UsageError) and enclave.book.record(job).queries == 0
        assert serving._runner.closed == 0  # type: ignore[attr-defined]
        assert ask(serving, job, "the colour is").completions == [RED]
    assert enclave.book.record(job).queries == 1


def test_a_question_asked_again_costs_nothing(enclave: Enclave) -> None:
    job = enclave.done_job(max_queries=2)
    computed: list[None] = []
    serving = service(enclave, lambda: computed.append(None))
    with working(serving):
        for prompt in ("a", "a", "b", "a"):
            assert ask(serving, job, prompt).completions == [RED]
        assert (len(computed), enclave.book.record(job).queries) == (2, 2)
        assert ask(serving, job, "c").error is not None  # they are used up
        # Over the channel too, where the right is looked at before anything waits.
        assert serving._answers.get(job, CLINIC.public.fingerprint, ["b"], 1) == [RED]
        assert serving._answers.get(job, LAB.public.fingerprint, ["b"], 1) is None
        assert serving._answers.get(job, CLINIC.public.fingerprint, ["b"], 2) is None


def test_answers_are_forgotten_before_they_are_too_many() -> None:
    answers = Answers()
    for number in range(MAX_ANSWERS + 1):
        answers.put("job", "party", [str(number)], 1, [RED])
    assert answers.get("job", "party", ["0"], 1) is None and answers.get("job", "party", ["1"], 1) == [RED]
    answers.put("job", "party", ["long"], 1, [replace(RED, text="x" * (MAX_CHARACTERS + 1))])
    assert answers.get("job", "party", ["1"], 1) is None and answers.get("job", "party", ["long"], 1) is None


def test_a_model_that_is_kept_is_forgotten_when_its_job_is_deleted(enclave: Enclave) -> None:
    job, closed = enclave.done_job(), threading.Event()
    serving = service(enclave, fail)
    serving._runner.kept = job  # type: ignore[misc]
    serving._runner.close = lambda: (setattr(serving._runner, "kept", None), closed.set())  # type: ignore[assignment, method-assign]
    thread = threading.Thread(target=serving.work)
    thread.start()
    enclave.book.delete(job, CLINIC.public.fingerprint)
    assert closed.wait(30)
    serving.stop()
    thread.join(30)
    assert not thread.is_alive()


def test_a_job_that_runs_is_cancelled_at_its_next_step(enclave: Enclave) -> None:
    job = enclave.submit(enclave.signed_job())

    class Stepping(FakeRunner):
        def run(self, signed: Any, checkpoint: Any, hooks: Any) -> dict[str, str]:
            hooks.progress(1, 10)
            enclave.book.cancel(job, CLINIC.public.fingerprint)
            serving.stop()
            hooks.progress(2, 10)
            raise AssertionError("it went on")

    serving = Service(enclave.book, Stepping(fail), lambda _: Server(), max_file_bytes=1 << 20)  # type: ignore[arg-type, return-value]
    serving.work()
    assert enclave.book.record(job).status == "cancelled" and enclave.book.record(job).step == 2


def test_the_operators_stop_ends_the_service_and_the_job_goes_on_later(enclave: Enclave) -> None:
    job = enclave.book.submit(enclave.signed_job(), LAB.public.fingerprint)

    def stop() -> None:
        raise SystemExit(0)

    with pytest.raises(SystemExit):
        service(enclave, stop).work()
    assert enclave.book.record(job).status == "running"  # which is resumed at the next start
