"""Small work on one thread: within the block only, after an error too, and of the calling thread alone."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from obfuscatune.protocol.threads import threads_for


def test_small_work_is_of_one_thread_and_large_work_is_not() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(1) as other:
            assert other.submit(torch.get_num_threads).result() == 3
            with threads_for(1000):
                assert torch.get_num_threads() == 1
                assert other.submit(torch.get_num_threads).result() == 3
            assert torch.get_num_threads() == 3
            with threads_for(10**9):
                assert torch.get_num_threads() == 3
            with pytest.raises(ZeroDivisionError), threads_for(1000):
                raise ZeroDivisionError
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
