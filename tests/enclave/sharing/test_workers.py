"""The workers of a sharing, seen from one thread while another has found a lie."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from obfuscatune.enclave.sharing.scheme import Scheme
from obfuscatune.enclave.sharing.uniform import Uniform
from obfuscatune.enclave.sharing.workers import Workers
from obfuscatune.errors import UsageError, WorkerFault


def four_workers() -> tuple[Workers, list[str]]:
    """Three and a spare, which nobody asks anything, and the names of those whose sessions were ended."""
    closed: list[str] = []

    def session(name: str) -> Any:
        def leave() -> None:
            closed.append(name)

        return SimpleNamespace(
            worker=name, shares_memory=False, timeout=1.0, has_ended=True, leave=leave, close=lambda: None
        )

    scheme = Scheme.make(spares=1)
    sessions = [session(f"w{i}") for i in range(len(scheme.points))]
    return Workers(sessions, scheme, Uniform(), verify=True), closed


def test_whoever_ends_because_another_lied_is_no_lost_worker(recwarn: pytest.WarningsRecorder) -> None:
    """The thread that found the lie has ended all sessions; in another thread each end looks like a loss."""
    workers, _ = four_workers()
    gone = WorkerFault("the worker is gone", worker="w1", layer="h.0", call=3)
    workers._has_lied = True
    for i in range(4):
        with pytest.raises(UsageError, match="ended by a product that was wrong") as caught:
            workers._take((i, gone), {})
        assert "w1" not in caught.value.what
    assert workers._lost == set() and not recwarn.list


def test_without_a_lie_the_end_is_a_loss() -> None:
    workers, closed = four_workers()
    gone = WorkerFault("the worker is gone", worker="w1", layer="h.0", call=3)
    found: dict[int, torch.Tensor] = {}
    with pytest.warns(UserWarning, match="a worker is lost, and a spare stands in: w1"):
        workers._take((1, gone), found)
    assert workers._lost == {1} and found == {}
    with pytest.raises(WorkerFault, match="the worker is gone"):
        workers._take((2, gone), found)
    assert closed == ["w0", "w1", "w2", "w3"]
