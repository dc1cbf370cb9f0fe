"""A7 to A13, A15, A17, A26: attacks on what tokens become, where they succeed and where not."""

from collections.abc import Callable

import pytest
import torch

from obfuscatune.studies.audit.attack import Score
from obfuscatune.studies.audit.attacks import all_attacks
from obfuscatune.studies.audit.attacks.alignment import couple

pytestmark = pytest.mark.slow

Attacked = Callable[..., Score]
STATIC = ["paper", "balanced", "stream"]
OF_TOKENS = ["A8", "A9", "A10", "A11", "A13", "A26"]


def test_a_coupling_is_of_both_marginals() -> None:
    scores = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prior = torch.arange(1, 10, dtype=torch.float64)
    prior = (prior / prior.sum()).log()
    plan = couple(scores, prior)
    torch.testing.assert_close(plan.sum(dim=1), torch.ones(6, dtype=torch.float64))
    assert (plan.mean(dim=0).log() - prior).abs().max() < 0.2


@pytest.mark.parametrize(
    ("attack", "profile", "least"),
    [
        *((name, profile, 0.8) for name in ("A9", "A10", "A11", "A26") for profile in STATIC),
        *(("A13", profile, 0.25) for profile in STATIC),
        ("A7", "paper", 0.9),
        ("A8", "paper", 0.8),
        ("A15", "balanced+attention=enclave+mlp=enclave", 0.6),
        ("A17", "paper", 0.3),
    ],
)
def test_what_it_breaks(attack: str, profile: str, least: float, attacked: Attacked) -> None:
    assert attacked(all_attacks()[attack], profile).success > least


@pytest.mark.parametrize("attack", [*OF_TOKENS, "A7", "A12", "A17"])
def test_mixed_rows_tell_nothing(attack: str, attacked: Attacked) -> None:
    score = attacked(all_attacks()[attack], "strict")
    assert score.success < score.chance + 0.06


def test_per_head_keys_close_the_pseudo_inverse(attacked: Attacked) -> None:
    """A7 is why q, k and v are keyed per head."""
    score = attacked(all_attacks()["A7"], "balanced")
    assert score.success < score.chance


def test_few_pairs_tell_few_directions(attacked: Attacked) -> None:
    attack = all_attacks()["A11"]
    few, all_of_them = (attacked(attack, "balanced", tokens=tokens).success for tokens in (16, 256))
    assert few < 0.95 < all_of_them
