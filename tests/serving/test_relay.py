"""Clients that leave while they wait, or while the enclave computes, hold nothing of those who stay."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from obfuscatune.errors import AttestationError, BusyError, ConnectionClosedError, ConsentError
from obfuscatune.parties.channel.faults import raise_from, to_fields
from obfuscatune.parties.identity import Identity
from obfuscatune.parties.reached import line_of
from obfuscatune.parties.upgrade import certify
from obfuscatune.parties.vocabulary import TOO_MANY
from obfuscatune.serving.limits import ServerLimits
from obfuscatune.serving.metrics import Metrics
from obfuscatune.serving.question import Question
from obfuscatune.serving.refusal import Refusal
from obfuscatune.serving.relay import PARALLEL, Enclave
from obfuscatune.serving.relayed import offer
from obfuscatune.serving.sampling import Settings
from obfuscatune.serving.seeds import MOST, SECONDS, Seeds

ELSEWHERE = Identity.generate("enclave", "x25519")
REPLY = {"prompt_tokens": [1], "completion_tokens": [2], "ended": [1]}
Parts = Iterator[tuple[dict[str, Any], bytes]]


class Channel:
    """One that a function answers, until it is closed."""

    verdict = None

    def __init__(self, answer: Callable[["Channel"], Parts]) -> None:
        self._answer = answer
        self.closed = threading.Event()

    def stream(self, fields: Any, payload: bytes, **more: Any) -> Parts:
        return self._answer(self)

    def request(self, fields: Any, **more: Any) -> tuple[dict[str, Any], bytes]:
        return next(self._answer(self))

    def close(self) -> None:
        self.closed.set()

    def __enter__(self) -> "Channel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def enclave_of(answer: Callable[[Channel], Parts], seconds: float = 30.0) -> Enclave:
    first: Any = SimpleNamespace(verdict=None)
    job: Any = SimpleNamespace(digest="job", max_queries=9, max_new_tokens=5)
    return Enclave(lambda: Channel(answer), first, job, "job", seconds)  # type: ignore[arg-type, return-value]


def question(show: Callable[[str], None] | None = None) -> Question:
    return Question("prompt", Settings(longest=5), show)


def test_who_leaves_gives_the_place_back_and_the_channel_up() -> None:
    go, asked, channels = threading.Event(), threading.Semaphore(0), list[Channel]()

    def answer(channel: Channel) -> Parts:
        channels.append(channel)
        asked.release()
        while not go.wait(0.01):
            if channel.closed.is_set():
                raise ConnectionClosedError("connection is closed")
        yield REPLY, b"text"

    async def scene() -> None:
        enclave = enclave_of(answer)
        questions = [question() for _ in range(PARALLEL + 3)]
        tasks = [asyncio.create_task(enclave.complete(one)) for one in questions]
        for _ in range(PARALLEL):
            await asyncio.to_thread(asked.acquire)
        assert enclave.load() == (3, PARALLEL)
        for task in (tasks[0], *tasks[PARALLEL + 1 :]):  # one that the enclave has, and two that wait
            task.cancel()
        await asyncio.gather(tasks[0], *tasks[PARALLEL + 1 :], return_exceptions=True)
        await asyncio.to_thread(asked.acquire)  # the one that waited has the place now
        assert enclave.load() == (0, PARALLEL) and questions[0].given_up
        go.set()
        await asyncio.gather(*tasks[1 : PARALLEL + 1])
        assert [one.text for one in questions] == ["", *["text"] * PARALLEL, "", ""]
        assert enclave.load() == (0, 0) and len(channels) == PARALLEL + 1

    asyncio.run(scene())


def test_a_place_is_given_back_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    enclave = enclave_of(lambda _: iter([(REPLY, b"text")]))

    def none_left(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def scene() -> None:
        with monkeypatch.context() as without:
            without.setattr(threading.Thread, "start", none_left)
            for _ in range(PARALLEL + 1):
                with pytest.raises(Refusal, match="no more threads") as refused:
                    await asyncio.wait_for(enclave.complete(question()), 10)
                assert refused.value.status == 503 and enclave.load() == (0, 0)
            with pytest.raises(Refusal, match="no more threads"):
                await enclave.progress()
        one = question()
        await enclave.complete(one)
        assert one.text == "text"

    asyncio.run(scene())


def test_a_question_waits_until_the_enclave_has_seen_that_another_client_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obfuscatune.serving.relay._PAUSE", 0.0)
    tries = list[int]()

    def answer(channel: Channel) -> Parts:
        tries.append(1)
        if len(tries) < 3:  # as it comes from the enclave: all of the text in one
            raise_from(to_fields(BusyError(TOO_MANY, expected="at most 4 of a party", hint="later")), "tls://HOST:7443")
        yield REPLY, b"text"

    one = question()
    asyncio.run(enclave_of(answer).complete(one))
    assert one.text == "text" and len(tries) == 3


def asked(answer: Callable[[Channel], Parts], *, stream: bool) -> str:
    """The body of the reply to a completion of at most five tokens; raises Refusal where its status tells."""

    async def scene() -> str:
        offered = offer(enclave_of(answer), ServerLimits(max_new_tokens=5), Metrics())
        body = {"model": "job", "prompt": "x", "max_tokens": 5, "stream": stream}
        reply: Any = await offered.text.answer(body, "id", again=False)
        return "".join([chunk async for chunk in reply.body_iterator]) if stream else reply.body.decode()

    return asyncio.run(scene())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("tokens", "ended", "reason"), [(3, 1, "stop"), (5, 0, "length"), (3, 0, "length")])
def test_why_a_completion_ended_is_told(tokens: int, ended: int, reason: str, stream: bool) -> None:
    """In the last case by the context, of which the enclave knows."""
    counts = {"prompt_tokens": [93], "completion_tokens": [tokens], "ended": [ended]}
    parts = [({"tokens": tokens}, b"abc"), (counts, b"")] if stream else [(counts, b'["abc"]')]
    assert f'"finish_reason":"{reason}"' in asked(lambda channel: iter(parts), stream=stream)


@pytest.mark.parametrize("stream", [False, True])
def test_what_fails_before_any_text_has_a_status(stream: bool) -> None:
    def answer(channel: Channel) -> Parts:
        raise ConsentError("the quota is used up")
        yield REPLY, b""

    with pytest.raises(Refusal, match="used up") as refused:
        asked(answer, stream=stream)
    assert refused.value.status == 403


def test_who_leaves_before_a_stream_begins_is_given_up() -> None:
    begun, left = threading.Event(), threading.Event()

    def answer(channel: Channel) -> Parts:
        begun.set()
        left.set() if channel.closed.wait(30) else None
        raise ConnectionClosedError("connection is closed")
        yield REPLY, b""

    async def scene() -> None:
        offered = offer(enclave_of(answer), ServerLimits(max_new_tokens=5), Metrics())
        work = asyncio.create_task(
            offered.text.answer({"model": "job", "prompt": "x", "stream": True}, "id", again=False)
        )
        await asyncio.to_thread(begun.wait, 30)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        assert await asyncio.to_thread(left.wait, 30)

    asyncio.run(scene())


def test_who_leaves_before_anything_of_a_stream_is_sent_is_given_up() -> None:
    """As one that reads nothing of its earlier answers: then the first bytes of this one wait."""
    left = threading.Event()

    def answer(channel: Channel) -> Parts:
        yield {"tokens": 1}, b"a"
        left.set() if channel.closed.wait(30) else None
        raise ConnectionClosedError("connection is closed")

    async def disconnect() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def stuck(message: Any) -> None:
        await asyncio.sleep(60)

    async def scene() -> None:
        offered = offer(enclave_of(answer), ServerLimits(max_new_tokens=5), Metrics())
        reply = await offered.text.answer({"model": "job", "prompt": "x", "stream": True}, "id", again=False)
        await reply({"type": "http", "asgi": {"spec_version": "2.3"}}, disconnect, stuck)
        assert await asyncio.to_thread(left.wait, 10)

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("counts", "payload"),
    [
        (REPLY, b"\xff"),
        (REPLY, b"x" * 10_000),
        ({}, b"text"),
        ({"tokens": 1}, b"text"),
        ({**REPLY, "completion_tokens": [10**10]}, b"text"),
        ({**REPLY, "prompt_tokens": [-1]}, b"text"),
        ({**REPLY, "prompt_tokens": [True]}, b"text"),
        ({**REPLY, "ended": []}, b"text"),
    ],
)
def test_a_reply_that_is_no_completion_is_an_error_of_the_gateway(counts: Any, payload: bytes) -> None:
    enclave = enclave_of(lambda channel: iter([(counts, payload)]))
    with pytest.raises(Refusal, match="no completion") as refused:
        asyncio.run(enclave.complete(question()))
    assert refused.value.status == 502 and enclave.load() == (0, 0)


@pytest.mark.parametrize("second", ["ab", "abcd", "aX", "a"])
def test_an_answer_that_is_asked_for_again_goes_on_or_is_refused(second: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obfuscatune.serving.relay._PAUSE", 0.0)
    shown: list[str] = []
    tries: list[int] = []

    def answer(channel: Channel) -> Parts:
        tries.append(len(tries))
        for letter in "ab" if len(tries) == 1 else second:
            yield {"tokens": 1}, letter.encode()
        if len(tries) == 1:
            raise ConnectionClosedError("connection is closed")
        yield REPLY, b""

    work = enclave_of(answer).complete(question(shown.append))
    if second.startswith("ab"):
        asyncio.run(work)
        assert "".join(shown) == second
    else:
        with pytest.raises(Refusal, match="no completion"):
            asyncio.run(work)
    assert len(tries) == 2


def stalls(channel: Channel) -> Parts:
    assert channel.closed.wait(30)
    raise ConnectionClosedError("connection is closed")
    yield REPLY, b""


def test_the_time_of_a_request_is_waiting_and_answer_together() -> None:
    async def scene() -> list[Any]:
        enclave = enclave_of(stalls, seconds=0.3)
        started = time.monotonic()
        work = [enclave.complete(question()) for _ in range(PARALLEL + 3)]
        outcomes = await asyncio.gather(*work, return_exceptions=True)
        assert time.monotonic() - started < 10  # all at once, though most had to wait
        return outcomes

    outcomes = asyncio.run(scene())
    assert [(refusal.status, refusal.code) for refusal in outcomes] == [(504, "timeout")] * (PARALLEL + 3)


def test_what_an_enclave_has_not_answered_at_the_end_is_told() -> None:
    async def scene() -> list[Any]:
        enclave = enclave_of(stalls)
        tasks = [asyncio.create_task(enclave.complete(question())) for _ in range(PARALLEL + 3)]
        while enclave.load() != (3, PARALLEL):
            await asyncio.sleep(0.01)
        enclave.give_up()
        return await asyncio.gather(*tasks, enclave.complete(question()), return_exceptions=True)

    assert {(refusal.status, refusal.code) for refusal in asyncio.run(scene())} == {(503, "unavailable")}


def test_a_renewal_that_stalls_holds_up_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obfuscatune.serving.relay.RENEWAL_SECONDS", 0.0)
    begun, go = threading.Event(), threading.Event()
    first: Any = SimpleNamespace(verdict=None)

    def connect() -> Any:
        begun.set()
        go.wait(30)
        raise ConnectionClosedError("too slow")

    for enclave in (
        Enclave(connect, first, first, "job", 30.0),
        enclave_of(lambda channel: begun.set() or stalls(channel)),
    ):
        enclave.start(on_fault=lambda: None)
        assert begun.wait(30)
        begun.clear()
        started = time.monotonic()
        enclave.close()
        assert time.monotonic() - started < 5
    go.set()


@pytest.mark.parametrize("shown", [b"", b"no certificate", b"{}", certify(ELSEWHERE, ELSEWHERE.public, "x")[:-9]])
def test_another_enclave_ends_the_session_whatever_it_shows(shown: bytes) -> None:
    """Certificates that are none would else be one refused question after the other, and `/health` would be well."""

    def connect() -> Any:
        channel: Any = SimpleNamespace(enclave=ELSEWHERE.public, request=lambda fields: ({}, shown))
        return line_of(channel, "ab" * 32)

    enclave, over = enclave_of(lambda _: iter([(REPLY, b"text")])), list[str]()
    enclave._connect, enclave._on_fault = connect, lambda: over.append("over")
    with pytest.raises(Refusal) as refused:
        asyncio.run(enclave.complete(question()))
    assert refused.value.status == 503 and not enclave.alive and over == ["over"]
    assert isinstance(enclave.fault, AttestationError)


@pytest.mark.parametrize(
    "told",
    [
        {"status": "x" * 1000},
        {"status": ["running"]},
        {"status": "running", "step": -1},
        {"status": "running", "queries": "<b>"},
        {"status": "running", "steps": 10**30},
    ],
)
def test_a_status_that_is_none_is_not_passed_on(told: dict[str, Any]) -> None:
    with pytest.raises(Refusal) as refused:
        asyncio.run(enclave_of(lambda channel: iter([(told, b"")])).progress())
    assert refused.value.status == 502


def test_polls_that_stall_hold_up_no_question() -> None:
    polls, go = list[Channel](), threading.Event()

    def answer(channel: Channel) -> Parts:
        polls.append(channel)
        assert go.wait(30)
        yield {"status": "running"}, b""

    enclave = enclave_of(answer)

    async def scene() -> list[dict[str, Any]]:
        waiting = [asyncio.create_task(enclave.progress()) for _ in range(50)]
        while not polls:
            await asyncio.sleep(0.01)
        enclave._connect = lambda: Channel(lambda _: iter([(REPLY, b"text")]))  # type: ignore[assignment, return-value]
        one = question()
        await asyncio.wait_for(enclave.complete(one), 20)
        assert one.text == "text"
        go.set()
        return await asyncio.gather(*waiting)

    assert len(asyncio.run(scene())) == 50 and len(polls) == 1


def test_who_asks_again_gets_the_same_random_numbers() -> None:
    now = [0.0]
    seeds = Seeds(lambda: now[0])
    first, second = (seeds.take(b"same", again=False) for _ in range(2))
    assert first.value != second.value  # two samples of one prompt
    first.state, second.state = "answered", "failed"
    assert seeds.take(b"same", again=True) is second
    second.state = "answered"
    assert seeds.take(b"same", again=True) in (first, second)  # an answer that did not arrive
    assert seeds.take(b"other", again=True) not in (first, second)
    now[0] = SECONDS + 1
    assert seeds.take(b"same", again=True) not in (first, second)
    for _ in range(2 * MOST):
        seeds.take(b"many", again=False)
    assert len(seeds._drawn) == MOST
