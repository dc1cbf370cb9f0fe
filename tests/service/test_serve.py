"""The service's loop: one job or one query may fail in any way, and the next is served."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import decoders

from obfuscatune.errors import BusyError, ConsentError, UsageError
from obfuscatune.parties.identity import Identity
from obfuscatune.parties.vocabulary import TURN_SECONDS
from obfuscatune.service import turns as turns_module
from obfuscatune.service.answers import MAX_ANSWERS, MAX_CHARACTERS, Answers
from obfuscatune.service.generation import Enough, Row
from obfuscatune.service.queries import Query
from obfuscatune.service.records import Record
from obfuscatune.service.serve import Service, open_service
from obfuscatune.service.turns import Turns
from obfuscatune.serving.sampling import Settings
from obfuscatune.training.completion import Completion

from .jobs import CLINIC, LAB, Enclave, open_enclave
from .platforms import new_platform

RED = Completion("red", 3, 1, False)


class Words:
    """A tokenizer whose every token is a word."""

    def decode(self, tokens: list[int], **_: Any) -> str:
        return " ".join(["red"] * len(tokens))


class Server:
    """A server that nobody connects to."""

    address = "tls://nowhere:1"

    def serve_forever(self) -> None:
        return

    def drain(self, seconds: float) -> None:
        return

    def close(self) -> None:
        return


class FakeRunner:
    """Does what it is told to instead of a job or an answer; ``check`` refuses one prompt."""

    kept: str | None = None

    def __init__(self, act: Callable[[], Any]) -> None:
        self.act = act
        self.closed = 0
        self.rounds: list[int] = []

    def run(self, *_: Any) -> dict[str, str]:
        self.act()
        return {}

    def check(self, signed: Any, adapter: str, query: Query) -> list[Row]:
        if "too long" in query.prompts:
            raise UsageError("prompt is too long for the model", where="prompt 1")
        return [Row(query, "prompt 1", [1, 2, 3], Words()) for _ in query.prompts]

    def answer(self, signed: Any, adapter: str, rows: list[Row], enough: Enough) -> None:
        self.rounds.append(len(rows))
        for steps in range(1, 1000):
            self.act()
            for row in rows:
                if not row.lapse():
                    row.take(7, frozenset())
            if enough(steps, 3) or all(row.done for row in rows):
                return

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def enclave(tmp_path: Path) -> Iterator[Enclave]:
    with open_enclave(tmp_path) as opened:
        yield opened


def service(enclave: Enclave, act: Callable[[], Any]) -> Service:
    return Service(enclave.book, FakeRunner(act), lambda _: Server(), max_file_bytes=1 << 20)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"listen": "127.0.0.1:7443"}, "not an address"),
        ({"listen": "tls://127.0.0.1:70000"}, "port out of range"),
        ({"listen": "tls://192.0.2.1:0"}, "cannot listen"),  # of no machine
        ({"worker": "tls://127.0.0.1:7000"}, "no fingerprint"),
        ({"timeout": -5.0}, "timeout"),
    ],
)
def test_a_mistyped_argument_makes_nothing(tmp_path: Path, more: dict[str, Any], match: str) -> None:
    platform = new_platform()
    arguments = {"listen": "tls://127.0.0.1:0", "parties": tmp_path / "parties", "worker": "spawn"} | more
    with pytest.raises(UsageError, match=match), open_service(tmp_path / "state", platform, **arguments):
        pass
    assert not list(tmp_path.iterdir()) and platform.counter.count == 0


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


def query_of(job: str, prompt: str, longest: int = 1, party: Identity = CLINIC) -> Query:
    return Query(job, party.public.fingerprint, [prompt], Settings(longest=longest))


def ask(serving: Service, job: str, prompt: str) -> Query:
    query = query_of(job, prompt)
    serving._answering.add(query)
    assert query.wait(30)
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
        answers = serving._answering._answers
        assert answers.get(query_of(job, "b").question) == [RED]
        assert answers.get(query_of(job, "b", party=LAB).question) is None
        assert answers.get(query_of(job, "b", 2).question) is None


def test_answers_are_forgotten_before_they_are_too_many() -> None:
    answers = Answers()
    for number in range(MAX_ANSWERS + 1):
        answers.put(str(number), [RED])
    assert answers.get("0") is None and answers.get("1") == [RED]
    answers.put("long", [replace(RED, text="x" * (MAX_CHARACTERS + 1))])
    assert answers.get("1") is None and answers.get("long") is None


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


def test_queries_are_answered_between_the_steps_of_a_job(enclave: Enclave) -> None:
    """For as long as the job has had, no longer; one that is not done then goes on after the next step."""
    done, running = enclave.done_job(), enclave.submit(enclave.signed_job())
    long, other = query_of(done, "a long one", 32), query_of(done, "a short one")
    found: list[float] = []
    drawn: list[torch.Tensor] = []

    class Stepping(FakeRunner):
        def run(self, signed: Any, checkpoint: Any, hooks: Any) -> dict[str, str]:
            torch.manual_seed(5)
            serving._answering.add(long)
            while not long.done and len(found) < 1000:
                hooks.progress(len(found), 1000)
                time.sleep(0.002)  # the step's work
                found.append(hooks.between())
                if len(found) == 1:
                    serving._answering.add(other)
            drawn.append(torch.rand(3))
            serving.stop()
            return {}

    def act() -> None:
        torch.rand(100)
        time.sleep(0.003)  # a token's

    serving = Service(enclave.book, runner := Stepping(act), lambda _: Server(), max_file_bytes=1 << 20)  # type: ignore[arg-type, return-value]
    serving.work()
    assert [len(c.text.split()) for c in (*long.completions, *other.completions)] == [32, 1]
    assert len(runner.rounds) > 2 and 2 in runner.rounds  # more than one turn, and the second query joined the first
    assert found == sorted(found) and found[-1] > 0
    torch.manual_seed(5)
    assert torch.equal(drawn[0], torch.rand(3))  # though queries have drawn random numbers
    assert enclave.book.record(done).queries == 2 and enclave.book.record(running).status == "done"


def test_turns_never_take_more_than_the_job_but_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked, costs = [100.0], list[float](), iter([3.0, 50.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr(turns_module.time, "monotonic", lambda: now[0])

    def turn(seconds: float) -> None:
        asked.append(seconds)
        now[0] += next(costs)

    turns = Turns(turn, lambda: True)
    for step in (5, 2, 40, 10, 2, 90):
        now[0] += step
        turns()
    # Two were left of five, and two more; then a model was loaded, and the job has its time back before the next turn.
    assert asked == [5, 4, 4, 5, TURN_SECONDS] and turns.seconds == 56


def test_a_question_that_a_kill_left_unanswered_is_paid_for_once(tmp_path: Path) -> None:
    """kill -9 between counting and answering: nothing but what is on the disk is left."""
    with open_enclave(tmp_path) as enclave:
        job = enclave.done_job(max_queries=2)
        serving = service(enclave, lambda: None)
        query = query_of(job, "the colour is")
        serving._answering.add(query)
        serving._answering._admit(other=True)  # counted, not computed
        assert enclave.book.record(job).queries == 1
        platform = enclave.platform
    with open_enclave(tmp_path, platform) as enclave:
        serving = service(enclave, lambda: None)
        with working(serving):
            assert ask(serving, job, "the colour is").completions == [RED]
            assert enclave.book.record(job).queries == 1
            assert ask(serving, job, "another").completions == [RED]
            assert enclave.book.record(job).queries == 2
            assert ask(serving, job, "the third").error is not None
            # Other settings are another question, which the first has not paid for.
            longer = query_of(job, "the colour is", 2)
            serving._answering.add(longer)
            assert longer.wait(30) and isinstance(longer.error, ConsentError)
    record = enclave.book.record(job)
    assert Record.from_fields(record.to_fields()) == record and len(record.counted.split()) == 2


@pytest.mark.parametrize("how", ["killed", "failed"])
def test_a_long_question_is_paid_for_once_though_many_come_after_it(how: str, tmp_path: Path) -> None:
    with open_enclave(tmp_path) as enclave:
        job = enclave.done_job(max_queries=99)
        long, short = query_of(job, "long", 30), [query_of(job, f"short {number}") for number in range(12)]
        later = iter(short)

        def act() -> None:
            if query := next(later, None):
                serving._answering.add(query)
            elif how == "failed" and short[-1].done:
                fail()

        serving = service(enclave, act)
        serving._answering.add(long)
        while not short[-1].done:
            serving._answering.turn(0.0)  # counted, and not answered to its end
        if how == "failed":
            serving._answering.turn()
            assert long.error is not None
        assert not long.completions and enclave.book.record(job).queries == 12 + (how == "killed")
        platform = enclave.platform
    with open_enclave(tmp_path, platform) as enclave:
        serving = service(enclave, lambda: None)
        serving._answering.add(again := query_of(job, "long", 30))
        serving._answering.turn()
        assert again.completions and enclave.book.record(job).queries == 13


def test_one_query_of_a_batch_fails_alone(enclave: Enclave) -> None:
    job = enclave.done_job()
    queries = [query_of(job, prompt) for prompt in ("a", "bad", "c")]

    class Failing(FakeRunner):
        def answer(self, signed: Any, adapter: str, rows: list[Row], enough: Enough) -> None:
            if any("bad" in row.query.prompts for row in rows):
                raise MemoryError
            super().answer(signed, adapter, rows, enough)

    serving = Service(enclave.book, Failing(lambda: None), lambda _: Server(), max_file_bytes=1 << 20)  # type: ignore[arg-type, return-value]
    for query in queries:
        serving._answering.add(query)
    with working(serving):
        assert all(query.wait(30) for query in queries)
    assert [type(query.error) for query in queries] == [type(None), MemoryError, type(None)]
    assert enclave.book.record(job).queries == 2


def test_a_failed_query_gives_back_only_what_it_was_counted_for(enclave: Enclave) -> None:
    job = enclave.done_job()
    serving = service(enclave, fail)
    with working(serving):
        assert enclave.book.questions.count(job, CLINIC.public.fingerprint, 1, 1, query_of(job, "a").question)
        for _ in range(3):  # as after a crash: it was counted then, and is asked again
            assert ask(serving, job, "a").error is not None
            assert enclave.book.record(job).queries == 1
    twins = [query_of(job, "b") for _ in range(4)]
    serving = service(enclave, fail)
    for query in twins:
        serving._answering.add(query)
    with working(serving):
        assert all(query.wait(30) and query.error is not None for query in twins)
    assert enclave.book.record(job).queries == 1  # once counted, once given back


@pytest.mark.parametrize("how", ["fails", "leaves", "is answered"])
def test_what_was_shown_is_paid_for_whoever_else_asks_the_same(enclave: Enclave, how: str) -> None:
    """A party that asks twice at once, of which one query shows it text, gets nothing back for the other."""
    job = enclave.done_job()
    first, second = (query_of(job, "a", 30) for _ in range(2))
    first.streaming = True
    steps: list[None] = []

    def act() -> None:
        steps.append(None)
        if how == "is answered":
            if len(steps) == 3:
                serving._answering.add(second)
            elif len(steps) == 31:  # the first has its 30 tokens, and one more query ends this round
                serving._answering.add(query_of(job, "b", 30))
            elif first.done:
                raise MemoryError
        elif len(steps) > 3:
            if first.next(0) is not None and how == "leaves":
                first.leave()
            raise MemoryError

    serving = service(enclave, act)
    serving._answering.add(first)
    if how != "is answered":
        serving._answering.add(second)
    with working(serving):
        assert first.wait(30) and second.wait(30)
    assert second.error is not None and enclave.book.record(job).queries == 1


def test_a_failed_query_of_a_job_that_is_forgotten_ends_alone(enclave: Enclave) -> None:
    job, later = enclave.done_job(), enclave.done_job()

    def forget() -> None:
        del enclave.book.records[job]
        raise RuntimeError

    serving = service(enclave, forget)
    serving._answering.add(query := query_of(job, "a"))
    with working(serving):
        assert query.wait(30) and query.error is not None
        serving._runner.act = lambda: None  # type: ignore[attr-defined]
        assert ask(serving, later, "b").completions == [RED]


def test_nothing_more_is_computed_when_the_job_is_gone(enclave: Enclave, monkeypatch: pytest.MonkeyPatch) -> None:
    job = enclave.done_job()
    computed: list[None] = []
    serving = service(enclave, lambda: computed.append(None))
    begin = serving._answering._begin

    def begin_then_leave(query: Query) -> None:
        begin(query)
        monkeypatch.setattr(enclave.book, "is_gone", lambda digest: True)

    monkeypatch.setattr(serving._answering, "_begin", begin_then_leave)
    serving._answering.add(query := query_of(job, "a"))
    with working(serving):
        assert query.wait(30)
    assert isinstance(query.error, ConsentError) and not computed


def test_who_leaves_has_nothing_more_computed_and_pays(enclave: Enclave) -> None:
    job = enclave.done_job()
    query = query_of(job, "a", 30)
    serving = service(enclave, query.leave)
    serving._answering.add(query)
    with working(serving):
        assert query.wait(30)
    assert query.completions[0].tokens == 0 and enclave.book.record(job).queries == 1
    assert serving._answering._answers.get(query.question) is None


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries have had their time after each token."""
    monkeypatch.setattr("obfuscatune.service.answering.TURN_SECONDS", 0.0)


@pytest.mark.usefixtures("no_patience")
def test_long_answers_keep_no_other_query_out(enclave: Enclave) -> None:
    """Of a query of 100 prompts, and of long ones of another job, a short one of each is not kept waiting."""
    jobs = [enclave.done_job(max_queries=200) for _ in range(2)]
    many = Query(jobs[0], CLINIC.public.fingerprint, ["a"] * 100, Settings(longest=30))
    long = [query_of(jobs[1], "b", 30), query_of(jobs[1], "c", 30)]
    short = [query_of(jobs[0], "d"), query_of(jobs[1], "e")]
    steps: list[None] = []

    def act() -> None:
        steps.append(None)
        if len(steps) == 5:
            for query in short:
                serving._answering.add(query)
        if all(query.done for query in short):
            for query in (many, *long):
                query.leave()

    serving = service(enclave, act)
    for query in (many, *long):
        serving._answering.add(query)
    with working(serving):
        assert all(query.wait(30) and query.completions == [RED] for query in short)
        assert all(query.wait(30) for query in (many, *long))
    assert len(steps) < 50 and not serving._answering.wanted and not serving._answering._paid
    assert [enclave.book.record(job).queries for job in jobs] == [101, 3]


@pytest.mark.usefixtures("no_patience")
def test_a_long_answer_keeps_no_job_waiting_and_goes_on_between_its_steps(enclave: Enclave) -> None:
    job = enclave.done_job()
    later = enclave.signed_job()
    long, ran = query_of(job, "a", 30), threading.Event()

    class Slow(FakeRunner):
        def run(self, *_: Any) -> dict[str, str]:
            assert not long.done
            ran.set()
            return {}

    serving = Service(
        enclave.book,
        Slow(lambda: enclave.submit(later) if not ran.is_set() else None),  # type: ignore[arg-type]
        lambda _: Server(),  # type: ignore[arg-type, return-value]
        max_file_bytes=1 << 20,
    )
    serving._answering.add(long)
    with working(serving):
        assert long.wait(30) and long.completions[0].tokens == 30
    assert ran.is_set() and enclave.book.record(job).queries == 1


def test_a_stop_answers_what_was_begun_and_nothing_else(enclave: Enclave) -> None:
    job = enclave.done_job()
    begun, late = query_of(job, "a", 30), query_of(job, "b")
    told: list[None] = []

    def act() -> None:
        if not told:
            told.append(serving.leave())  # as SIGTERM does
            serving._answering.add(late)

    serving = service(enclave, act)
    serving._answering.add(begun)
    with pytest.raises(SystemExit):
        serving.work()
    assert begun.completions[0].tokens == 30 and not late.done
    serving.close()
    assert isinstance(late.error, BusyError) and enclave.book.record(job).queries == 1


@pytest.mark.usefixtures("no_patience")
def test_a_stop_answers_what_was_set_aside_too(enclave: Enclave) -> None:
    """It was begun and paid for; another, which waits as long, was not."""
    job = enclave.done_job()
    long, late = query_of(job, "a", 30), query_of(job, "c")
    other = Query(job, CLINIC.public.fingerprint, ["b"] * 8, Settings(longest=30))  # as many as fit
    told: list[None] = []

    def act() -> None:
        if not long.sent and id(long) not in serving._answering._set_aside:
            serving._answering.add(other)  # for which it goes to the end of the queue
            long.sent = 1
        elif id(long) in serving._answering._set_aside and not told:
            serving._answering.add(late)
            told.append(serving.leave())

    serving = service(enclave, act)
    serving._answering.add(long)
    with pytest.raises(SystemExit):
        serving.work()
    assert told and long.completions[0].tokens == other.completions[0].tokens == 30 and not late.done


def test_a_stop_between_the_turns_of_a_job_answers_after_its_step(enclave: Enclave) -> None:
    """Though the query had more than its time: the loading of a model is taken off what it gets later."""
    done, running = enclave.done_job(), enclave.submit(enclave.signed_job())
    begun, told = query_of(done, "a", 30), list[None]()

    class Stepping(FakeRunner):
        def run(self, signed: Any, checkpoint: Any, hooks: Any) -> dict[str, str]:
            serving._answering.add(begun)
            hooks.between()
            assert not begun.done and begun.prompts
            told.append(serving.leave())
            hooks.between()
            raise AssertionError("it went on")

        def check(self, *arguments: Any) -> list[Row]:
            time.sleep(0.05)  # the load, far longer than the step before it
            return super().check(*arguments)

    serving = Service(enclave.book, Stepping(lambda: time.sleep(0.001)), lambda _: Server(), max_file_bytes=1 << 20)  # type: ignore[arg-type, return-value]
    with pytest.raises(SystemExit):
        serving.work()
    assert told and begun.completions[0].tokens == 30
    assert enclave.book.record(running).status == "running"  # which is resumed at the next start


def test_a_second_stop_waits_for_nothing(enclave: Enclave) -> None:
    job = enclave.done_job()
    query = query_of(job, "a", 30)
    serving = service(enclave, lambda: serving.leave())
    serving._answering.add(query)
    with pytest.raises(SystemExit):
        serving.work()
    serving.close()
    assert isinstance(query.error, BusyError) and enclave.book.record(job).queries == 1  # which asking again uses
