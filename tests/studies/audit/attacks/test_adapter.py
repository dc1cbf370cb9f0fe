"""A20: texts that were served are found among those that were trained on, in a session under other keys."""

from collections.abc import Callable

import pytest
import torch

from obfuscatune.studies.audit.attack import Score
from obfuscatune.studies.audit.attacks.adapter import ATTACK, _alike, _gram, adapter_rank
from obfuscatune.studies.audit.lab import RANK, Recorded

pytestmark = pytest.mark.slow


def test_a_text_is_recognized_at_any_size() -> None:
    """Each call of mixed rows has its own."""
    texts = torch.randn(6, 8, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    sizes = torch.arange(1.0, 7.0, dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(_alike(_gram(sizes * texts), _gram(texts)), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("profile", ["paper", "naive", "balanced", "balanced+attention=enclave+mlp=enclave", "stream"])
def test_texts_are_recognized_across_sessions(profile: str, attacked: Callable[..., Score]) -> None:
    assert attacked(ATTACK, profile).success > 0.95


@pytest.mark.parametrize("profile", ["paper", "balanced", "stream"])
def test_other_text_is_not(profile: str, attacked: Callable[..., Score]) -> None:
    """The sham: second halves of the trained texts. Eight texts against eight leave much to luck."""
    assert attacked(ATTACK, profile, sham=True).success < 0.7


def test_mixed_rows_are_not(attacked: Callable[..., Score]) -> None:
    assert attacked(ATTACK, "strict").success < 0.8


@pytest.mark.parametrize(("profile", "rank"), [("paper", RANK), ("balanced", RANK), ("stream", RANK), ("strict", 0)])
def test_the_rank_is_seen_where_factors_cross(profile: str, rank: int, recorded: Callable[[str], Recorded]) -> None:
    assert adapter_rank(recorded(profile).sample.training) == rank
