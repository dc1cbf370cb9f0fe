"""Dense keys with a condition number: prescribed, or as bad as a Gaussian matrix's."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from obfuscatune.enclave.keys import MasterSecret, Stream, conditioned, gaussian
from obfuscatune.errors import KeyFaultError, UsageError


@given(st.integers(1, 40), st.floats(1.0, 1e4), st.integers(0, 100))
@settings(deadline=None, max_examples=40)
def test_condition_number_is_the_prescribed_one(n: int, kappa: float, seed: int) -> None:
    key = conditioned(MasterSecret.from_insecure_test_seed(seed).stream("c"), n, kappa)
    singular = torch.linalg.svdvals(key.dense())
    expected = kappa if n > 1 else 1.0
    assert (singular[0] / singular[-1]).item() == pytest.approx(expected, rel=1e-9)  # measured 1e-12 at kappa 1e4
    assert key.condition_number == pytest.approx(expected, rel=1e-14)
    assert singular.log().sum().item() == pytest.approx(0, abs=1e-9)
    if n > 2:
        steps = singular.log().diff()
        assert (steps - steps.mean()).abs().max().item() < 1e-9  # geometric spacing


@pytest.mark.parametrize("kappa", [0.5, math.inf, math.nan, -3.0])
def test_impossible_condition_numbers_are_refused(master: MasterSecret, kappa: float) -> None:
    with pytest.raises(UsageError, match="condition number is impossible"):
        conditioned(master.stream("c"), 4, kappa)


def test_gaussian_entries_and_condition_number(master: MasterSecret) -> None:
    n = 128
    key = gaussian(master.stream("g"), n)
    r = key.dense()
    assert abs(r.mean().item()) < 6 * math.sqrt(1 / n) / n
    assert abs(r.var().item() * n - 1) < 6 * math.sqrt(2) / n
    assert key.condition_number == pytest.approx(torch.linalg.cond(r).item(), rel=1e-9)
    assert key.condition_number > 16  # of order n; below n / 8 with chance under 1e-30 (Edelman 1988)


def test_singular_gaussian_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stream, "normal", lambda self, *shape: torch.ones(shape, dtype=torch.float64))
    with pytest.raises(KeyFaultError, match="singular"):
        gaussian(Stream(bytes(32)), 4)
