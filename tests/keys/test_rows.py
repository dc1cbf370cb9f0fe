"""Row mixings: orthogonal, undone exactly, fresh in every draw, and each pair of rows is mixed."""

import pytest
import torch

from obfuscatune.keys import MasterSecret
from obfuscatune.keys.rows import RowMixer, mixed_rows


def mixer(seed: int = 1) -> RowMixer:
    return RowMixer(MasterSecret.from_insecure_test_seed(seed).stream("rows"))


def matrices(rows: int, count: int = 2, seed: int = 1) -> torch.Tensor:
    return mixer(seed).draw(count, rows).mix(torch.eye(rows, dtype=torch.float64).repeat(count, 1, 1))


@pytest.mark.parametrize("rows", [1, 15, 128, 192, 320])
def test_orthogonal_and_undone(rows: int) -> None:
    mixing = mixer().draw(2, rows)
    x = torch.randn(2, rows, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = mixing.mix(x)
    assert (y.mT @ y - x.mT @ x).abs().max() < 1e-12
    assert (mixing.unmix(y, rows) - x).abs().max() < 1e-13
    assert torch.equal(mixing.unmix(y, 1), mixing.unmix(y, rows)[:, :1])


def test_every_row_is_in_every_row() -> None:
    assert (matrices(320) == 0).double().mean() < 1e-3
    assert matrices(320).abs().max() < 0.35  # 5.7 standard deviations: no row stands out


def test_no_two_parts_or_draws_are_alike() -> None:
    drawer = mixer()
    identity = torch.eye(15, dtype=torch.float64).repeat(2, 1, 1)
    first, second = (drawer.draw(2, 15).mix(identity) for _ in range(2))
    rows = torch.cat([*first, *second])
    assert ((rows @ rows.T).abs() > 0.999).sum() == len(rows)
    assert torch.equal(matrices(15), matrices(15))
    assert not torch.equal(matrices(15), matrices(15, seed=2))


@pytest.mark.parametrize(("rows", "expected"), [(1, 1), (128, 128), (129, 192), (768, 768), (2049, 2176)])
def test_rows_are_a_multiple_of_their_blocks(rows: int, expected: int) -> None:
    assert mixed_rows(rows) == expected
