"""The ledger of a session's memory, and the system's limit behind it."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from obfuscatune.errors import ProtocolError
from obfuscatune.worker.budget import _ENTRY_BYTES, Ledger, budget_of_each, free_bytes, is_out_of_memory

POOL = [torch.empty(n, dtype=torch.uint8) for n in (0, 1, 100, 1000, 10_000)]
actions = st.lists(
    st.tuples(st.integers(0, 3), st.none() | st.lists(st.integers(0, len(POOL) - 1), max_size=4)), max_size=30
)


@given(actions, st.none() | st.integers(0, 40_000))
def test_each_storage_counts_once_and_never_beyond_the_budget(
    steps: list[tuple[int, list[int] | None]], budget: int | None
) -> None:
    ledger, held = Ledger(budget), {}
    for key, chosen in steps:
        if chosen is None:
            ledger.drop(key)
            held.pop(key, None)
        else:
            after = {**held, key: set(chosen)}
            try:
                ledger.hold(key, [POOL[i][:1] for i in chosen])  # views count as what they are views of
                held = after
            except ProtocolError:
                assert _bytes(after) > (budget or 0)
        assert ledger.held == _bytes(held)


def _bytes(held: dict[int, set[int]]) -> int:
    return _ENTRY_BYTES * len(held) + sum(POOL[i].numel() for i in set().union(*held.values()))


def test_shares_are_equal_and_leave_room() -> None:
    free = free_bytes(torch.device("cpu"))
    assert 2**28 < free < 2**46
    assert 2 * budget_of_each(free, 2) < free
    assert budget_of_each(0, 8) > 0


HUNGRY = """
import torch
from obfuscatune.worker.budget import is_out_of_memory, limit_process
(torch.ones(64, 64) @ torch.ones(64, 64)).sum()
limit_process({budget}, torch.device("cpu"))
kept = []
try:
    for _ in range(100):
        kept.append(torch.empty(2**23))  # 32 MiB, never touched
except Exception as error:
    assert is_out_of_memory(error), error
print(len(kept))
"""


@pytest.mark.parametrize(("budget", "least", "most"), [(2**27, 3, 12), (2**40, 100, 100)])
def test_the_system_stops_what_is_not_counted(budget: int, least: int, most: int) -> None:
    """The second is the control: with a larger budget the same program takes all it wants."""
    script = HUNGRY.format(budget=budget)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)  # noqa: S603
    assert least <= int(done.stdout) <= most


def test_other_errors_are_not_of_memory() -> None:
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"))
