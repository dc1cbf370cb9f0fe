"""Mixing is what stops the attacks on mixed rows: where it mixes nothing, they read the recording and succeed."""

from typing import Any

import pytest
import torch

from obfuscatune.enclave.keys.rows import RowMixer, RowMixing
from obfuscatune.studies.audit.attacks import all_attacks
from obfuscatune.studies.audit.fixtures import Fixtures
from obfuscatune.studies.audit.lab import record
from obfuscatune.studies.audit.runner import corpus_of, try_attack

# Budgets whose passes have other numbers of tokens than the padded ones that cross: 16, 48 and 192.
BUDGETS = (16, 64, 256)


@pytest.mark.slow
def test_without_mixing_the_same_attacks_succeed(untaught: Fixtures, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(self: Any, count: int, rows: int) -> RowMixing:
        return RowMixing([], torch.arange(rows).expand(count, rows).clone())

    def success(name: str) -> float:
        attack = all_attacks()[name]
        inputs = {"profile": "strict", "seed": 0}
        outcome = try_attack(attack, recorded, untaught.base, corpus_of(untaught), BUDGETS[-1], {}, inputs)
        assert outcome.success is not None
        return outcome.success

    with monkeypatch.context() as patch:
        patch.setattr(RowMixer, "draw", draw)
        recorded = record(untaught, "strict", 0, BUDGETS)
    least = {"A9": 0.9, "A11": 0.9, "A12": 0.5, "A13": 0.5, "A20": 0.5, "A21": 0.9, "A24": 0.3, "A26": 0.8}
    found = {name: success(name) for name in least}
    assert all(found[name] > least[name] for name in least), sorted(found.items())
    recorded = record(untaught, "strict", 0, BUDGETS)
    found = {name: success(name) for name in least if name != "A20"}  # of which a few texts say little
    assert max(found.values()) < 0.15, found
