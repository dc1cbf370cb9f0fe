"""Clients that leave while they wait, or while the enclave computes, hold nothing of those who stay."""

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from obfuscatune.serving.refusal import Refusal
from obfuscatune.serving.relay import PARALLEL, Enclave

REPLY = {"prompt_tokens": [1], "completion_tokens": [2], "ended": [1]}


def enclave_of(request: Any) -> Enclave:
    """One that is asked by a function, and not over a channel."""
    first: Any = SimpleNamespace(verdict=None)
    job: Any = SimpleNamespace(digest="job")
    enclave = Enclave(lambda: first, first, job, "job", 30.0)
    enclave.request = request  # type: ignore[method-assign]
    return enclave


def test_who_leaves_gives_the_place_back_when_the_enclave_has_answered() -> None:
    go, asked = threading.Event(), threading.Semaphore(0)

    def request(fields: Any, payload: bytes) -> tuple[Any, bytes]:
        asked.release()
        assert go.wait(30)
        return REPLY, b'["text"]'

    async def scene() -> None:
        enclave = enclave_of(request)
        tasks = [asyncio.create_task(enclave.complete("prompt", 5)) for _ in range(PARALLEL + 3)]
        for _ in range(PARALLEL):
            await asyncio.to_thread(asked.acquire)
        assert enclave.load() == (3, PARALLEL)
        for task in (tasks[0], *tasks[PARALLEL:]):  # one that the enclave has, and all that wait
            task.cancel()
        await asyncio.gather(tasks[0], *tasks[PARALLEL:], return_exceptions=True)
        assert enclave.load() == (0, PARALLEL)
        go.set()
        assert await asyncio.gather(*tasks[1:PARALLEL]) == [("text", 1, 2, True)] * (PARALLEL - 1)
        assert (await enclave.complete("prompt", 5))[0] == "text" and enclave.load() == (0, 0)

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("counts", "payload"),
    [
        (REPLY, b"[" * 100_000),
        (REPLY, b"{}"),
        (REPLY, b"[]"),
        ({**REPLY, "completion_tokens": [10**10]}, b'["text"]'),
        ({**REPLY, "prompt_tokens": [-1]}, b'["text"]'),
        ({**REPLY, "ended": []}, b'["text"]'),
    ],
)
def test_a_reply_that_is_no_completion_is_an_error_of_the_gateway(counts: Any, payload: bytes) -> None:
    enclave = enclave_of(lambda fields, data: (counts, payload))
    with pytest.raises(Refusal, match="no completion") as refused:
        asyncio.run(enclave.complete("prompt", 5))
    assert refused.value.status == 502 and enclave.load() == (0, 0)
