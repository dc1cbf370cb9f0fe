"""Row mixings: orthogonal, undone exactly, fresh in every draw, and each pair of rows is mixed."""

import pytest
import torch

from obfuscatune.enclave.keys import MasterSecret
from obfuscatune.enclave.keys.rows import RowMixer, mixed_rows


def mixer(seed: int = 1) -> RowMixer:
    return RowMixer(MasterSecret.from_insecure_test_seed(seed).stream("rows"))


def matrices(rows: int, count: int = 2, seed: int = 1) -> torch.Tensor:
    return mixer(seed).draw(count, rows).mix(torch.eye(rows, dtype=torch.float64).repeat(count, 1, 1))


@pytest.mark.parametrize("rows", [1, 15, 128, 192, 320])
@pytest.mark.parametrize("at_once", [1, 200_000])  # a part at a time in strips of 128 columns, and all in one
def test_orthogonal_and_undone(rows: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obfuscatune.enclave.keys.rows._AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    mixing, scale = mixer().draw(2, rows), torch.tensor([3.0, -0.5], dtype=torch.float64)
    x = torch.randn(2, rows, 300, generator=generator, dtype=torch.float64)
    y = mixing.mix(x)
    assert (y.mT @ y - x.mT @ x).abs().max() < 1e-12
    assert (mixing.unmix(y, scale, rows) - (3 * x[0] - x[1] / 2)).abs().max() < 1e-13
    assert torch.equal(mixing.unmix(y, scale, 1), mixing.unmix(y, scale, rows)[:1])
    assert torch.equal(mixing.mix(x, torch.float32), y.float())


@pytest.mark.parametrize("rows", [15, 192])
@pytest.mark.parametrize("together", [1, 2, 3])
def test_mixing_is_the_dense_matrix_of_each_part(rows: int, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The obviously correct reference: A_i as a matrix, its transpose, and a sum; parts are grouped or not."""
    for name in ("_AT_ONCE", "_SMALL_AT_ONCE"):
        monkeypatch.setattr(f"obfuscatune.enclave.keys.rows.{name}", together * rows * 300)
    mixing, scale = mixer().draw(3, rows), torch.tensor([1.0, 2.0, 0.25], dtype=torch.float64)
    dense = mixing.mix(torch.eye(rows, dtype=torch.float64).repeat(3, 1, 1))
    y = torch.randn(3, rows, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert (mixing.mix(y) - dense @ y).abs().max() < 1e-13
    expected = sum(c * a.T @ part for c, a, part in zip(scale, dense, y, strict=True))
    assert (mixing.unmix(y, scale, rows) - expected).abs().max() < 1e-13
    assert (mixing.unmix(y, scale.flip(0), rows) - expected).abs().max() > 0.1  # the control: parts are told apart


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
