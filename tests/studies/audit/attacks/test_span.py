"""A19 and A23: rows lie in the span of what they went into."""

from collections.abc import Callable

import pytest
import torch

from obfuscatune.studies.audit.attack import Score, area_under_curve
from obfuscatune.studies.audit.attacks.span import ATTACKS, Check
from obfuscatune.studies.audit.lab import Recorded

pytestmark = pytest.mark.slow

GRADIENT, ROWS = ATTACKS
PROFILES = ["paper", "balanced", "balanced+attention=enclave+mlp=enclave", "stream"]


def rows(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("count", "least"), [(8, 0.999), (24, 0.999), (48, 0.6)])
def test_rows_of_a_call_have_the_least_leverage(count: int, least: float) -> None:
    """Beyond the width, where the span is the whole space, too."""
    inside, outside = rows(count, 0), rows(200, 1)
    check = Check.of([inside])
    assert area_under_curve(-check.leverage(inside), -check.leverage(outside)).success > least


def test_rows_are_told_by_any_combinations_of_them() -> None:
    """Mixing alone hides no span; noise rows do."""
    inside, outside = rows(16, 0), rows(200, 1)
    mixed = torch.linalg.qr(rows(32, 2)[:16, :16]).Q @ inside
    check = Check.of([mixed])
    assert area_under_curve(-check.leverage(inside), -check.leverage(outside)).success > 0.999


def test_orthonormal_columns_tell_nothing() -> None:
    check = Check.of([torch.linalg.qr(rows(64, 0)).Q])
    torch.testing.assert_close(check.leverage(rows(5, 1)), torch.ones(5, dtype=torch.float64))


def test_tiles_are_judged_each_on_its_own() -> None:
    inside = rows(8, 0)
    check = Check.of([inside[:, :16], rows(8, 3)[:, 16:]])
    assert check.inverse.shape == (32, 32)
    assert not check.inverse[:16, 16:].any()


@pytest.mark.parametrize("profile", PROFILES)
def test_static_keys_show_rows(profile: str, attacked: Callable[..., Score]) -> None:
    assert attacked(ROWS, profile, tokens=16).success > 0.95
    assert attacked(ROWS, profile).success > 0.95


@pytest.mark.parametrize("profile", PROFILES)
def test_static_keys_show_what_a_gradient_is_made_of(profile: str, attacked: Callable[..., Score]) -> None:
    assert attacked(GRADIENT, profile).success > 0.95


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.id)
def test_mixed_rows_do_not(attack: object, attacked: Callable[..., Score]) -> None:
    assert abs(attacked(attack, "strict").success) < 0.3


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.id)
def test_nor_does_another_session(attack: object, attacked: Callable[..., Score], stranger: Recorded) -> None:
    assert abs(attacked(attack, "balanced", truth_of=stranger).success) < 0.4
