"""Weak keys are caught, and a test that catches everything is none."""

import pytest
import torch
from torch import Tensor

from obfuscatune.studies.audit import canaries
from obfuscatune.studies.audit.canaries import check_canaries
from obfuscatune.studies.audit.fixtures import Fixtures


@pytest.mark.parametrize("seed", range(3))
def test_weak_keys_are_caught(untaught: Fixtures, seed: int) -> None:
    found = check_canaries(untaught, seed)
    assert [canary.name for canary in found] == ["fixed seed", "four reflections", "Kronecker product"]
    assert all(canary.caught for canary in found)


def test_where_the_proper_key_is_weak_too_nothing_is_caught(
    untaught: Fixtures, monkeypatch: pytest.MonkeyPatch
) -> None:
    def identity(size: int, generator: torch.Generator) -> Tensor:
        return torch.eye(size, dtype=torch.float64)

    monkeypatch.setattr(canaries, "_haar", identity)
    assert not any(canary.caught for canary in check_canaries(untaught, 0))
