"""Products on threads of a worker's own: one thread of torch in each, and an error comes when all have ended."""

import threading

import pytest
import torch

from obfuscatune.worker.pool import on_threads


def test_each_is_done_on_one_thread_of_torch() -> None:
    assert on_threads(lambda i: (i, torch.get_num_threads()), 3) == [(0, 1), (1, 1), (2, 1)]
    assert on_threads(lambda i: threading.current_thread(), 1) == [threading.current_thread()]


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
