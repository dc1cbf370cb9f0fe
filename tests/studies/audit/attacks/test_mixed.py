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


def draw_none(self: Any, count: int, rows: int) -> RowMixing:
    """Rows stay where they are."""
    return RowMixing([], torch.arange(rows).expand(count, rows).clone())


@pytest.mark.slow
def test_neurons_are_separated_in_part_without_mixing(fixtures: Fixtures, monkeypatch: pytest.MonkeyPatch) -> None:
    """A14, on a trained model: neurons of another are Gaussian, and no separation finds them anywhere."""
    monkeypatch.setattr(RowMixer, "draw", draw_none)
    recorded = record(fixtures, "strict", 0, BUDGETS)
    inputs = {"profile": "strict", "seed": 0}
    attack = all_attacks()["A14"]
    outcome = try_attack(attack, recorded, fixtures.base, corpus_of(fixtures), BUDGETS[-1], {}, inputs)
    assert outcome.success is not None and outcome.chance is not None
    assert outcome.success > outcome.chance + 0.04  # .08 was seen; mixed, .005 is one deviation


@pytest.mark.slow
def test_without_mixing_the_same_attacks_succeed(untaught: Fixtures, monkeypatch: pytest.MonkeyPatch) -> None:
    def success(name: str) -> float:
        attack = all_attacks()[name]
        inputs = {"profile": "strict", "seed": 0}
        outcome = try_attack(attack, recorded, untaught.base, corpus_of(untaught), BUDGETS[-1], {}, inputs)
        assert outcome.success is not None
        return outcome.success

    with monkeypatch.context() as patch:
        patch.setattr(RowMixer, "draw", draw_none)
        recorded = record(untaught, "strict", 0, BUDGETS)
    # A11 pairs rows of the size that they have in the model with those of a call, which are brought to one size.
    least = {"A9": 0.9, "A11": 0.75, "A12": 0.5, "A13": 0.5, "A20": 0.5, "A21": 0.9, "A24": 0.3, "A26": 0.8}
    found = {name: success(name) for name in least}
    assert all(found[name] > least[name] for name in least), sorted(found.items())
    recorded = record(untaught, "strict", 0, BUDGETS)
    found = {name: success(name) for name in least if name != "A20"}  # of which a few texts say little
    assert max(found.values()) < 0.15, found
