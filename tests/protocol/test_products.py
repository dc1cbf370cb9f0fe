"""The few-rows product against the stock one."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st

from obfuscatune.protocol.products import FEW_ROWS, linear

EXACT = 1e-12  # float64, absolute, sums of at most 40 terms of size 1; measured 3e-15


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=3),
    st.integers(1, 40),
    st.integers(1, 40),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_linear_is_the_stock_linear(
    shape: list[int], inside: int, out: int, biased: bool, grad: bool, strided: bool
) -> None:
    generator = torch.Generator().manual_seed(inside * 41 + out)
    x, weight = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((*shape, inside), (out, inside)))
    if strided:  # as a product with the weight on the left leaves them
        x = x.T.contiguous().T if x.ndim == 2 else x.movedim(-1, 0).contiguous().movedim(0, -1)
    bias = torch.randn(out, dtype=torch.float64, generator=generator) if biased else None
    with torch.set_grad_enabled(grad):
        ours = linear(x, weight, bias)
    theirs = F.linear(x, weight, bias)
    assert ours.shape == theirs.shape
    assert ours.is_contiguous()
    assert torch.allclose(ours, theirs, rtol=0, atol=EXACT)
    assert ours.numel() == 0 or not torch.allclose(ours + 1e-6, theirs, rtol=0, atol=EXACT)


@pytest.mark.parametrize("rows", [1, 2, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_keeps_its_dtype(rows: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(rows, 64).to(dtype), torch.randn(32, 64).to(dtype)
    ours = linear(x, weight)
    assert ours.dtype == dtype
    assert torch.allclose(
        ours.double(), x.double() @ weight.double().T, rtol=2e-2, atol=2e-1 if dtype.itemsize == 2 else 1e-4
    )
