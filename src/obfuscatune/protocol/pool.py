"""Parts of one work on threads of a process's own, none of which waits for the others but at the end."""

import functools
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from obfuscatune.protocol.threads import threads_for

T = TypeVar("T")


def on_threads(work: Callable[[int], T], threads: int) -> list[T]:
    """Return ``work(i)`` for i below ``threads``: the first on this thread, which would only wait, others on their own.

    With more than one, torch starts no threads in any of them. Raises what one of them raises, after all have ended:
    none reads or writes any more what the caller gives up then, after an interrupt either.
    """
    if threads == 1:
        return [work(0)]

    def one(i: int) -> T:
        with threads_for(0):
            return work(i)

    others: list[Future[T]] = []
    before = torch.get_num_threads()
    try:
        for i in range(1, threads):
            others.append(_pool().submit(one, i))
        return [one(0), *(other.result() for other in others)]
    finally:
        wait(others)
        # Torch gives a thread that computes for the first time the number that any thread has set last: 1, by these.
        torch.set_num_threads(before)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="parts")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a fork has none of the threads, and would wait for them
