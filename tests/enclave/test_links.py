"""Which worker gets which blocks."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obfuscatune.enclave.links import spread
from obfuscatune.errors import UsageError


def links(*memory: int | None) -> list[Any]:
    return [
        SimpleNamespace(memory_bytes=bytes_, session=SimpleNamespace(worker=f"w{i}")) for i, bytes_ in enumerate(memory)
    ]


def test_equal_workers_share_alike() -> None:
    assert spread([10] * 6, links(100, 100, 100)) == [0, 0, 1, 1, 2, 2]
    assert spread([10] * 7, links(None, None)) == [0, 0, 0, 0, 1, 1, 1]


def test_a_larger_worker_gets_more() -> None:
    assert spread([10] * 12, links(100, 20)) == [0] * 10 + [1] * 2
    assert spread([10] * 12, links(40, 80)) == [0] * 4 + [1] * 8


def test_who_says_nothing_gets_what_the_smallest_gets() -> None:
    assert spread([10] * 8, links(200, None, 400)) == [0, 0, 1, 1, 2, 2, 2, 2]


def test_everybody_gets_a_block() -> None:
    assert spread([10] * 3, links(1000, 1, 1000)[:1] + links(1000, 10, 10)[1:]) == [0, 1, 2]


def test_too_little_memory_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"cannot hold the model: got 40 bytes .* 4 blocks.*at most 30 \(at w0\)"):
        spread([10] * 8, links(30, 30))


def test_more_workers_than_blocks() -> None:
    with pytest.raises(UsageError, match="more workers than blocks: got 3"):
        spread([10, 10], links(None, None, None))


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=24),
    memory=st.lists(st.none() | st.integers(1_000, 10_000), min_size=1, max_size=6),
)
def test_runs_in_order_that_leave_nobody_out(sizes: list[int], memory: list[int | None]) -> None:
    memory = memory[: len(sizes)]
    placed = spread(sizes, links(*memory))
    assert len(placed) == len(sizes)
    assert placed == sorted(placed)
    assert set(placed) == set(range(len(memory)))
