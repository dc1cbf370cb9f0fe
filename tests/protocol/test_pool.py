"""Parts of a work on threads: one thread of torch in each, and an error comes when all have ended."""

import multiprocessing
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from obfuscatune.protocol import pool
from obfuscatune.protocol.pool import on_threads
from obfuscatune.protocol.threads import threads_for


def test_each_is_done_on_one_thread_of_torch() -> None:
    before = torch.get_num_threads()
    assert on_threads(lambda i: (i, torch.get_num_threads()), 3) == [(0, 1), (1, 1), (2, 1)]
    assert on_threads(lambda i: threading.current_thread(), 1) == [threading.current_thread()]
    first, second = on_threads(lambda i: threading.current_thread(), 2)
    assert first is threading.current_thread() and second is not first
    assert torch.get_num_threads() == before


def test_a_thread_that_comes_later_has_all_threads_of_torch() -> None:
    may_end = threading.Event()

    def work(i: int) -> None:
        if i == 0:  # ends first
            threading.Timer(0.05, may_end.set).start()
        else:
            assert may_end.wait(10)

    before = torch.get_num_threads()
    pool._pool.cache_clear()
    torch.set_num_threads(3)
    try:
        barrier = threading.Barrier(3)
        with threads_for(0):  # the pool's threads begin with one, as where the first is faster than they start
            on_threads(lambda i: barrier.wait(10), 3)
        on_threads(work, 3)
        with ThreadPoolExecutor(1) as new:
            assert new.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)


def test_an_error_waits_for_the_others() -> None:
    may_end, ended = threading.Event(), []

    def work(i: int) -> None:
        if i == 0:
            threading.Timer(0.05, may_end.set).start()
            raise MemoryError
        assert may_end.wait(10)
        ended.append(i)

    with pytest.raises(MemoryError):
        on_threads(work, 2)
    assert ended == [1]


def test_where_no_more_threads_start_those_under_way_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = threading.Event(), []

    class Pool:
        def submit(self, one: Any, i: int) -> Any:
            if i > 1:
                assert begun.wait(10)
                raise RuntimeError("can't start new thread")
            return executor.submit(one, i)

    def work(i: int) -> None:
        begun.set()
        time.sleep(0.05)  # as a computation that does not heed it
        ended.append(i)

    with ThreadPoolExecutor() as executor:
        monkeypatch.setattr(pool, "_pool", Pool)
        with pytest.raises(RuntimeError, match="start new thread"):
            on_threads(work, 3)
        assert ended == [1]


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # of os.fork, from Python 3.12 on
def test_a_fork_has_threads_of_its_own() -> None:
    on_threads(abs, 3)  # threads that the fork does not have
    child = multiprocessing.get_context("fork").Process(target=on_threads, args=(abs, 3))
    child.start()
    child.join(30)
    done = child.exitcode == 0
    child.kill()
    assert done
