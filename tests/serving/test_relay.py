"""Clients that leave while they wait, or while the enclave computes, hold nothing of those who stay."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from obfuscatune.errors import ConnectionClosedError
from obfuscatune.serving.question import Question
from obfuscatune.serving.refusal import Refusal
from obfuscatune.serving.relay import PARALLEL, Enclave
from obfuscatune.serving.sampling import Settings

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

    def close(self) -> None:
        self.closed.set()

    def __enter__(self) -> "Channel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def enclave_of(answer: Callable[[Channel], Parts]) -> Enclave:
    first: Any = SimpleNamespace(verdict=None)
    job: Any = SimpleNamespace(digest="job")
    return Enclave(lambda: Channel(answer), first, job, "job", 30.0)  # type: ignore[arg-type, return-value]


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
