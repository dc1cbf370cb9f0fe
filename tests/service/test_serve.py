"""The service's loop: one job or one query may fail in any way, and the next is served."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import decoders

from obfuscatune.service.requests import Query
from obfuscatune.service.serve import Service

from .jobs import CLINIC, LAB, Enclave, open_enclave


class Server:
    """A server that nobody connects to."""

    address = "tls://nowhere:1"

    def serve_forever(self) -> None:
        return

    def close(self) -> None:
        return


class FakeRunner:
    """Does what it is told to instead of a job or an answer."""

    kept: str | None = None

    def __init__(self, act: Callable[[], Any]) -> None:
        self.act = act

    def run(self, *_: Any) -> dict[str, str]:
        self.act()
        return {}

    def answer(self, *_: Any) -> list[str]:
        self.act()
        return ["red"]

    closed = False

    def close(self) -> None:
        self.closed = True


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


@pytest.mark.parametrize("act", [panic, fail])
def test_a_query_that_fails_in_any_way_costs_nothing(enclave: Enclave, act: Callable[[], None]) -> None:
    """It is answered, its prompts are given back, and the model stays for the next one."""
    job = enclave.done_job()
    party, acts = CLINIC.public.fingerprint, [lambda: None, act]
    failing, good = (Query(job, party, ["the colour is", "and"], 1) for _ in range(2))
    serving = service(enclave, lambda: acts.pop()())
    thread = threading.Thread(target=serving.work)
    thread.start()
    for query in (failing, good):
        serving._ask(query)
        assert query.done.wait(30)
    assert failing.error is not None and not failing.completions
    assert good.error is None and good.completions == ["red"]
    assert enclave.book.record(job).queries == 2 and not serving._runner.closed  # type: ignore[attr-defined]
    assert enclave.told()[-3:] == ["query", "query-failed", "query"]
    serving.stop()
    thread.join(30)
    assert not thread.is_alive()


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
