"""A18: gradients at the output tell what is in the loss, and which labels are equal."""

from collections.abc import Callable

import pytest
import torch

from obfuscatune.studies.audit.attack import NotApplicableError, Score, TrainingTruth
from obfuscatune.studies.audit.attacks.labels import ATTACK, mask_score, pair_score
from obfuscatune.studies.audit.lab import Recorded

pytestmark = pytest.mark.slow


def truth(scored: torch.Tensor) -> TrainingTruth:
    tokens = torch.arange(scored.numel()).view(scored.shape) % 3
    return TrainingTruth([tokens], [scored], 4, {})


def test_zero_rows_are_outside_the_loss() -> None:
    scored = torch.tensor([[True, False, True, False], [False, True, True, False]])
    gradient = scored.flatten()[:, None] * torch.ones(8, 5)
    assert mask_score([gradient], truth(scored)).success == 1.0
    assert mask_score([1.0 - gradient], truth(scored)).success == -1.0


def test_what_the_position_tells_is_no_success() -> None:
    scored = torch.tensor([[True, False, True], [True, False, False]])
    by_place = torch.tensor([2.0, 1.0, 1.5, 2.0, 1.0, 1.5])[:, None]
    assert mask_score([by_place], truth(scored)).success == 0.0
    with pytest.raises(NotApplicableError, match="position"):
        mask_score([by_place], truth(torch.tensor([[True, False, True]] * 2)))


def test_one_label_one_direction() -> None:
    scored = torch.ones(2, 6, dtype=torch.bool)
    known = truth(scored)
    labels = known.batches[0].roll(-1, dims=1).flatten()
    assert pair_score([torch.eye(3)[labels]], known) == 1.0
    noise = torch.randn(12, 40, generator=torch.Generator().manual_seed(0))
    assert 0.2 < pair_score([noise], known) < 0.8


@pytest.mark.parametrize("profile", ["paper", "balanced", "stream"])
def test_static_keys_show_the_loss_mask_and_equal_labels(profile: str, attacked: Callable[..., Score]) -> None:
    score = attacked(ATTACK, profile)
    assert score.success > 0.99
    assert score.value is not None
    assert score.value > 0.85


def test_mixed_rows_do_not(attacked: Callable[..., Score]) -> None:
    score = attacked(ATTACK, "strict")
    assert abs(score.success) < 0.2
    assert score.value is not None
    assert abs(score.value - 0.5) < 0.05


def test_nor_do_gradients_of_another_session(attacked: Callable[..., Score], stranger: Recorded) -> None:
    assert abs(attacked(ATTACK, "balanced", truth_of=stranger).success) < 0.3
