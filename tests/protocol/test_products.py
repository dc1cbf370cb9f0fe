"""The few-rows product against the stock one."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st

from obfuscatune.protocol import cpu as cpu_module
from obfuscatune.protocol import halves
from obfuscatune.protocol.cpu import is_intel, widened_from
from obfuscatune.protocol.products import FEW_ROWS, linear

EXACT = 1e-12  # float64, absolute, sums of at most 40 terms of size 1; measured 3e-15


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=3),
    st.integers(1, 40),
    st.integers(1, 40),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_linear_is_the_stock_linear(
    shape: list[int], inside: int, out: int, biased: bool, grad: bool, strided: bool, intel: bool
) -> None:
    generator = torch.Generator().manual_seed(inside * 41 + out)
    x, weight = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((*shape, inside), (out, inside)))
    if strided:  # as a product with the weight on the left leaves them
        x = x.T.contiguous().T if x.ndim == 2 else x.movedim(-1, 0).contiguous().movedim(0, -1)
    bias = torch.randn(out, dtype=torch.float64, generator=generator) if biased else None
    with torch.set_grad_enabled(grad), pytest.MonkeyPatch.context() as patch:
        patch.setattr("obfuscatune.protocol.products.is_intel", lambda: intel)
        ours = linear(x, weight, bias)
    theirs = F.linear(x, weight, bias)
    assert ours.shape == theirs.shape
    assert ours.is_contiguous()
    assert torch.allclose(ours, theirs, rtol=0, atol=EXACT)
    assert ours.numel() == 0 or not torch.allclose(ours + 1e-6, theirs, rtol=0, atol=EXACT)


@pytest.mark.parametrize("rows", [1, 2, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("intel", [False, True])
def test_lower_precision_keeps_its_dtype(
    rows: int, dtype: torch.dtype, intel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("obfuscatune.protocol.products.is_intel", lambda: intel)
    x, weight = torch.randn(rows, 64).to(dtype), torch.randn(32, 64).to(dtype)
    ours = linear(x, weight)
    assert ours.dtype == dtype
    assert torch.allclose(
        ours.double(), x.double() @ weight.double().T, rtol=2e-2, atol=2e-1 if dtype.itemsize == 2 else 1e-4
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "inside", "out"), [(4, 8, 8), (5, 33, 70), (40, 64, 17), (4, 5, 1), (130, 33, 70)])
def test_a_product_in_float32_rounds_once(
    rows: int, inside: int, out: int, biased: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("obfuscatune.protocol.products.widened_from", lambda dtype: (4, 1))
    for slab in ("_SLAB", "_LARGE_SLAB"):
        monkeypatch.setattr(halves, slab, 5 * inside)  # slabs of five rows, and a shorter one
    generator = torch.Generator().manual_seed(rows + out)
    shapes = [(rows, inside), (out, inside), *([(out,)] if biased else [])]
    tensors = [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    ideal = [tensor.detach().double().requires_grad_() for tensor in tensors]
    ours, theirs = linear(*tensors), F.linear(*ideal)
    dy = torch.randn(rows, out, generator=generator).to(dtype)
    ours.backward(dy), theirs.backward(dy.double())
    half = torch.finfo(dtype).eps / 2  # of rounding once; and of float32's sums, beside
    for found, true in ((ours, theirs), *((a.grad, b.grad) for a, b in zip(tensors, ideal, strict=True))):
        assert found is not None and true is not None and found.dtype == dtype
        assert torch.allclose(found.double(), true, rtol=half, atol=1e-5)
        assert not torch.allclose(found.double() * (1 + 4 * half), true, rtol=half, atol=1e-5)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(linear(*tensors), ours)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(*tensors).dtype == torch.bfloat16  # as the stock product


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_a_product_in_float32_gives_each_gradient_alone(trained: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obfuscatune.protocol.products.widened_from", lambda dtype: (4, 1))
    tensors = [torch.randn(*shape).bfloat16() for shape in ((4, 8), (6, 8), (6,))]
    tensors[trained].requires_grad_()
    y = linear(*tensors)
    if trained == 2:
        tensors[1].add_(1)  # which the gradient of the bias does not need
    y.sum().backward()
    assert [tensor.grad is not None for tensor in tensors] == [i == trained for i in range(3)]


def test_a_product_in_float32_keeps_no_wide_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obfuscatune.protocol.products.widened_from", lambda dtype: (4, 1))
    x, weight = torch.randn(4, 8).bfloat16().requires_grad_(), torch.randn(6, 8).bfloat16()

    def kept(product: Callable[[], torch.Tensor]) -> set[torch.dtype]:
        dtypes = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: dtypes.add(t.dtype) or t, lambda t: t):
            product()
        return dtypes

    assert kept(lambda: linear(x, weight)) == {torch.bfloat16}
    assert torch.float32 in kept(lambda: F.linear(x.float(), weight.float()))  # the control


@pytest.mark.parametrize(
    ("cpu", "products", "expected"),
    [
        ({"cpu_name": "AMD EPYC"}, False, {torch.bfloat16: (4, 1), torch.float16: (4, 1)}),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, True, {torch.bfloat16: None, torch.float16: None}),
        ({"cpu_name": "Intel", "avx512_bf16": True}, True, {torch.bfloat16: (128, 128), torch.float16: None}),
        ({"cpu_name": "Intel", "amx_bf16": True}, True, {torch.bfloat16: None, torch.float16: None}),
    ],
)
def test_what_is_widened_depends_on_the_cpu(
    cpu: dict[str, object],
    products: bool,
    expected: dict[torch.dtype, tuple[int, int] | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    monkeypatch.setattr("obfuscatune.protocol.cpu.has_products", lambda dtype: products)
    for cached in (is_intel, widened_from):  # under the caches, which stay as they are
        monkeypatch.setattr(f"obfuscatune.protocol.cpu.{cached.__name__}", cached.__wrapped__)
    assert {dtype: cpu_module.widened_from(dtype) for dtype in expected} == expected


def test_only_products_that_are_faster_so_are_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obfuscatune.protocol.products.widened_from", lambda dtype: (6, 5))
    widened: list[int] = []

    def widen(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        widened.append(len(x))
        return halves.widened_linear(x, weight, bias)

    monkeypatch.setattr("obfuscatune.protocol.products.widened_linear", widen)
    for rows in (0, 1, 5, 6, 7):
        linear(torch.randn(rows, 8).bfloat16(), torch.randn(5, 8).bfloat16())
    linear(torch.randn(2, 3, 8).bfloat16(), torch.randn(6, 8).bfloat16())  # six rows in two of three
    for narrow in ((4, 8), (8, 4)):
        linear(torch.randn(7, narrow[1]).bfloat16(), torch.randn(*narrow).bfloat16())
    assert widened == [6, 7, 6]
