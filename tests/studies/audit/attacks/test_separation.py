"""A14: independent sparse neurons come out of a dense key; those of a trained model in part; mixed rows not at all."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from obfuscatune.studies.audit.algebra import centred
from obfuscatune.studies.audit.attack import Score
from obfuscatune.studies.audit.attacks.separation import ATTACK, correlations, drawn_turn, separate, whiten
from obfuscatune.studies.audit.lab import Recorded

pytestmark = pytest.mark.slow


def neurons(bias: float, rows: int = 2000, width: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.nn.functional.gelu(torch.randn(rows, width, generator=generator, dtype=torch.float64) + bias)


def test_sparse_independent_neurons_are_separated() -> None:
    true = neurons(-1.0)
    keyed = true @ drawn_turn(24, 5)
    whitener = whiten(keyed)
    found = keyed @ whitener @ separate(centred(keyed) @ whitener)
    assert (correlations(found, true) > 0.9).double().mean() > 0.9


def test_gaussian_ones_are_not() -> None:
    """All bases of them are alike."""
    true = torch.randn(2000, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    keyed = true @ drawn_turn(24, 5)
    whitener = whiten(keyed)
    found = keyed @ whitener @ separate(centred(keyed) @ whitener)
    assert (correlations(found, true) > 0.9).double().mean() < 0.2


def test_whitened_rows_have_unit_covariance_and_no_direction_of_rounding() -> None:
    rows = neurons(0.0, width=6) @ torch.eye(6, 9, dtype=torch.float64)
    whitener = whiten(rows)
    assert whitener.shape == (9, 6)
    torch.testing.assert_close(torch.cov((rows @ whitener).T), torch.eye(6, dtype=torch.float64))
    assert whiten(rows[:4]).shape == (9, 3)


@pytest.mark.parametrize("profile", ["paper", "balanced+attention=enclave+mlp=enclave"])
def test_a_dense_key_is_undone_in_part(profile: str, attacked: Callable[..., Score]) -> None:
    score = attacked(ATTACK, profile)
    assert score.success > score.chance + 0.05


@pytest.mark.parametrize("profile", ["balanced", "stream"])
def test_an_order_hides_no_neuron(profile: str, attacked: Callable[..., Score]) -> None:
    score = attacked(ATTACK, profile, tokens=16)
    assert score.success > 0.99
    assert score.chance < 0.8
    assert score.value == 1.0


def test_mixed_rows_tell_nothing(attacked: Callable[..., Score]) -> None:
    score = attacked(ATTACK, "strict")
    assert abs(score.success - score.chance) < 0.04  # .005 is one deviation over sessions
    assert score.value is not None
    assert score.value < 0.02  # of 256 neurons one, in 1 of 6 sessions; as a random rotation has it


def test_another_text_is_not_found(attacked: Callable[..., Score], stranger: Recorded) -> None:
    score = attacked(ATTACK, "balanced", truth_of=stranger)
    assert score.success < score.chance + 0.05
