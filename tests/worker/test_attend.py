"""Attention of any shape against its equation in float64, and one row of a half dtype, which goes its own way."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from obfuscatune.worker.attention import attend

EXACT = 1e-13  # float64; measured 1.1e-15
# Relative to the largest number: one rounding to bfloat16 is at most 2^-9, two with a soft cap; measured 2.8e-3.
ROUNDED = 2**-8


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Tensor:
    """The last of T rows attends to all S tokens, each one before it to one less; float64."""
    share = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(share, dim=1) for t in (k, v))
    logits = q.double() @ k.mT * scale
    logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(k.shape[2] - q.shape[2] + 1)
    return logits.masked_fill(future, -math.inf).softmax(-1) @ v


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 20), st.booleans())
@settings(deadline=None, max_examples=60)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_is_the_equation(
    softcap: float | None, batch: int, groups: int, share: int, new: int, cached: int, strided: bool
) -> None:
    generator = torch.Generator().manual_seed(cached)
    q = torch.randn(batch, groups * share, new, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, batch, groups, cached + new + 9, 8, generator=generator, dtype=torch.float64)
    k, v = k[:, :, 4 : 4 + cached + new], v[:, :, 4 : 4 + cached + new]
    if not strided:
        k, v = k.contiguous(), v.contiguous()
    found = attend(q, k, v, mask=None, scale=0.3, softcap=softcap)
    assert torch.allclose(found, reference(q, k, v, 0.3, softcap), rtol=0, atol=EXACT)


@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize("narrow", [False, True])
def test_one_row_of_bfloat16_is_as_good_as_its_rounding(
    monkeypatch: pytest.MonkeyPatch, narrow: bool, softcap: float | None
) -> None:
    monkeypatch.setattr("obfuscatune.worker.attention.attends_in", lambda dtype: narrow)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, s, 64, generator=generator).bfloat16() for h, s in ((6, 1), (2, 200), (2, 200)))
    found = attend(q, k, v, mask=None, scale=0.125, softcap=softcap)
    expected = attend(*(t.double() for t in (q, k, v)), mask=None, scale=0.125, softcap=softcap)
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() <= ROUNDED * expected.abs().max()
