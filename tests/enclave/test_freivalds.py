"""Freivalds' check: honest products of every dtype pass, with room; wrong ones do not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from obfuscatune.enclave.freivalds import CHECKS, FACTOR, NOISE, Check
from obfuscatune.enclave.keys import MasterSecret

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
GENERATOR = torch.Generator().manual_seed(0)


def case(dtype: torch.dtype, width: int = 768, out: int = 768, rows: int = 256) -> tuple[Check, Tensor, Tensor]:
    weight = torch.randn(width, out, generator=GENERATOR).to(dtype)
    x = (torch.randn(rows, width, generator=GENERATOR) * torch.logspace(1, -2, width)).to(dtype)
    return Check(weight, MasterSecret.from_insecure_test_seed(5).stream("check")), x, x @ weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bound_of_the_documents(dtype: torch.dtype) -> None:
    assert (0.8 * FACTOR * NOISE[dtype]) ** CHECKS[dtype] < 2**-40


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "out"), [(768, 2304), (3072, 768), (64, 15)])
@pytest.mark.parametrize("rows", [1, 8, 256])
def test_honest_products_are_far_from_the_limit(dtype: torch.dtype, width: int, out: int, rows: int) -> None:
    check, x, y = case(dtype, width, out, rows)
    assert check.holds(x, y)
    check._tolerance /= 2  # 1e5 calls of 1e4 numbers are 1e9: 6 of 16 or more standard deviations
    assert check.holds(x, y)
    check._tolerance /= 100
    assert not check.holds(x, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_transpose_and_tiles(dtype: torch.dtype) -> None:
    weight = torch.randn(96, 40, generator=GENERATOR).to(dtype)
    check = Check(weight, MasterSecret.from_insecure_test_seed(5).stream("check"))
    starts = (0, 32, 64, 48)
    x, g = (torch.randn(*shape, generator=GENERATOR).to(dtype) for shape in ((4, 20, 32), (20, 40)))
    y = torch.stack([tile @ weight[start : start + 32] for start, tile in zip(starts, x, strict=True)])
    assert check.holds(x, y, starts=starts)
    assert check.holds(x[2], y[2], starts=starts[2:3]) and not check.holds(x[2], y[2], starts=starts[1:2])
    assert check.holds(g, g @ weight.T, transpose=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 20])
def test_one_wrong_row_of_one_tile_is_refused(rows: int, dtype: torch.dtype) -> None:
    weight = torch.randn(96, 40, generator=GENERATOR).to(dtype)
    check = Check(weight, MasterSecret.from_insecure_test_seed(5).stream("check"))
    x = torch.randn(3, rows, 32, generator=GENERATOR).to(dtype)
    y = torch.bmm(x, weight.view(3, 32, 40))
    assert check.holds(x, y, starts=(0, 32, 64))
    for tile in range(3):
        wrong = y.clone()
        wrong[tile, -1] *= 1.05
        assert not check.holds(x, wrong, starts=(0, 32, 64))
    assert not check.holds(x, y.roll(1, 0), starts=(0, 32, 64))


def one(y: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    y = y.clone()
    y[17] = change(y[17])
    return y


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": lambda y: y * 0,
    "one row of zeros": lambda y: one(y, lambda row: row * 0),
    "rows swapped": lambda y: y.index_select(0, torch.tensor([1, 0, *range(2, len(y))])),
    "another sign": lambda y: -y,
    "one row a little larger": lambda y: one(y, lambda row: row * 1.05),
    "noise in one entry": lambda y: one(y, lambda row: row + 0.05 * row.norm() * (torch.arange(len(row)) == 3)),
    "NaN": lambda y: one(y, lambda row: row * torch.nan),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_products_are_refused(wrong: str, dtype: torch.dtype) -> None:
    check, x, y = case(dtype)
    assert not check.holds(x, WRONG[wrong](y))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("part", [-1.1, -0.97, -0.8, -0.6, 0.6, 0.8, 0.97])
def test_rows_whose_squares_have_no_room(part: float, rows: int, dtype: torch.dtype) -> None:
    """With an infinite right side anything would pass; with one of zero no honest product."""
    weight = torch.randn(96, 40, generator=GENERATOR).to(dtype)
    check = Check(weight, MasterSecret.from_insecure_test_seed(5).stream("check"))
    x = torch.randn(rows, 96, generator=GENERATOR)
    y = numbers(rows, 40) * torch.finfo(dtype).max ** min(abs(part), 0.97)
    assert not check.holds(x.to(dtype), y.to(dtype))
    scale = torch.finfo(dtype).max ** part if part > -1 else torch.finfo(dtype).tiny / 16
    x = (x.double() * scale / 32).to(dtype)
    y = x @ weight
    assert check.holds(x, y)
    if part > -0.9:  # below that it is the rounding of numbers that are not normal
        assert not check.holds(x, one_off(y))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("gain", [1e2, 1e8])
def test_numbers_that_are_not_normal_may_be_taken_as_zero(gain: float, rows: int, dtype: torch.dtype) -> None:
    """Hardware products in bfloat16 do so, and large weights make normal numbers of what is missing."""
    weight = (torch.randn(96, 40, generator=GENERATOR) * gain).to(dtype)
    check = Check(weight, MasterSecret.from_insecure_test_seed(5).stream("check"))
    tiny = torch.finfo(dtype).tiny
    x = (torch.randn(rows, 96, generator=GENERATOR).double() * tiny).to(dtype)
    assert check.holds(x, x @ weight)
    assert check.holds(x, torch.where(x.abs() < tiny, 0, x) @ weight)
    x = (x.double() * 4096).to(dtype)
    assert check.holds(x, x @ weight) and not check.holds(x, one_off(x @ weight))


def numbers(rows: int, width: int) -> Tensor:
    return torch.randn(rows, width, generator=GENERATOR, dtype=torch.float64).clamp(-1, 1)


def one_off(y: Tensor) -> Tensor:
    y = y.clone()
    y[-1] = y[-1].flip(0)
    return y


def test_what_is_smaller_than_rounding_is_not_seen() -> None:
    check, x, y = case(torch.float32)
    assert check.holds(x, one(y, lambda row: row * (1 + 1e-7)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "calls", "dtype"),  # one row is summed otherwise than many; each row is checked
    [(1, 5_000, torch.float32), (1, 5_000, torch.bfloat16), (64, 100, torch.bfloat16)],
    ids=str,
)
def test_a_hundred_thousand_honest_rows_pass(rows: int, calls: int, dtype: torch.dtype) -> None:
    for _ in range(20):
        weight = torch.randn(768, 768, generator=GENERATOR).to(dtype)
        check = Check(weight, MasterSecret.from_insecure_test_seed(5).stream("check"))
        check._tolerance *= 0.75
        for _ in range(calls):
            x = torch.randn(rows, 768, generator=GENERATOR).to(dtype)
            assert check.holds(x, x @ weight)
