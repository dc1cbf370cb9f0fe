"""Threads of a worker's own, of which each does whole products: none waits for the others but at the end."""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from obfuscatune.protocol.threads import threads_for

T = TypeVar("T")


def on_threads(work: Callable[[int], T], threads: int) -> list[T]:
    """Return ``work(i)`` for i below ``threads``, each on a thread of its own, on which torch starts no more of them.

    Raises what one of them raises, after all have ended: none writes any more into what the caller gives up.
    """
    if threads == 1:
        return [work(0)]

    def one(i: int) -> T:
        with threads_for(0):
            return work(i)

    futures = [_pool().submit(one, i) for i in range(threads)]
    wait(futures)
    return [future.result() for future in futures]


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="products")
