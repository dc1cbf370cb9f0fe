"""A22: lengths are in masks, in zero gradients, and in sizes."""

from collections.abc import Callable

import pytest

from obfuscatune.studies.audit.attack import Score
from obfuscatune.studies.audit.attacks.shape import ATTACK, tokens_of
from obfuscatune.studies.audit.lab import Recorded

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("profile", ["paper", "balanced", "stream"])
def test_lengths_are_read_from_masks_or_gradients(profile: str, attacked: Callable[..., Score]) -> None:
    score = attacked(ATTACK, profile)
    assert score.success == 1.0
    assert score.value == 0.0


def test_padding_and_mixing_hide_lengths_but_not_sizes(attacked: Callable[..., Score]) -> None:
    score = attacked(ATTACK, "strict")
    assert score.success < score.chance + 0.15
    assert score.value is not None
    assert score.value < 0.5


def test_lengths_of_another_session_are_others(attacked: Callable[..., Score], stranger: Recorded) -> None:
    assert attacked(ATTACK, "balanced", truth_of=stranger).success < 0.5


@pytest.mark.parametrize(("profile", "tokens"), [("balanced", [16, 48, 192]), ("strict", [32, 48, 192])])
def test_tokens_of_a_request(profile: str, tokens: list[int], recorded: Callable[[str], Recorded]) -> None:
    """16 tokens are padded to 32; other sizes are steps of the padding."""
    assert [tokens_of(calls[0]) for calls in recorded(profile).sample.view.passes] == tokens
