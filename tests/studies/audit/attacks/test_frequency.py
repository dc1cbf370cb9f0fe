"""A21: equal tokens have equal rows, under a static key."""

from collections.abc import Callable

import pytest
import torch

from obfuscatune.studies.audit.attack import Score
from obfuscatune.studies.audit.attacks.frequency import ATTACK, cluster, without_position
from obfuscatune.studies.audit.lab import Recorded

pytestmark = pytest.mark.slow


def test_tokens_are_alike_once_the_position_is_taken_off() -> None:
    generator = torch.Generator().manual_seed(0)
    words, places = torch.randn(6, 40, generator=generator), 5 * torch.randn(4, 40, generator=generator)
    tokens = torch.randint(6, (300,), generator=generator)
    where = torch.arange(300) % 4
    directions = without_position(words[tokens] + places[where], where)
    equal = tokens[:, None] == tokens
    cosines = directions @ directions.mT
    assert cosines[equal].min() > cosines[~equal].max()
    assert set(cluster(directions).tolist()) == {tokens.tolist().index(token) for token in set(tokens.tolist())}


def test_clusters_join_what_is_near() -> None:
    directions = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [0.1, 0.9]]), dim=1)
    assert cluster(directions).tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("profile", ["paper", "naive", "balanced", "stream"])
@pytest.mark.parametrize("tokens", [16, 256])
def test_static_keys_show_equal_tokens(profile: str, tokens: int, attacked: Callable[..., Score]) -> None:
    score = attacked(ATTACK, profile, tokens=tokens)
    assert score.success > 0.95
    assert score.chance < 0.2


def test_mixed_rows_do_not(attacked: Callable[..., Score]) -> None:
    score = attacked(ATTACK, "strict")
    assert abs(score.success - score.chance) < 0.1


def test_nor_does_another_text(attacked: Callable[..., Score], stranger: Recorded) -> None:
    score = attacked(ATTACK, "balanced", truth_of=stranger)
    assert abs(score.success - score.chance) < 0.15
