"""What attacks compute with: against slow references."""

import itertools

import pytest
import torch

from obfuscatune.studies.audit.algebra import key_success, matching, nearest, polar, procrustes


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("seed", range(5))
def test_matching_takes_the_best_pair_first(seed: int) -> None:
    scores = draw(9, 9, seed=seed)
    expected = torch.full((9,), -1)
    for row, column in sorted(itertools.product(range(9), range(9)), key=lambda p: -scores[p].item()):
        if expected[row] < 0 and column not in expected:
            expected[row] = column
    assert torch.equal(matching(scores), expected)


def test_procrustes_finds_a_rotation() -> None:
    rows, key = draw(40, 8), polar(draw(8, 8, seed=1))
    torch.testing.assert_close(procrustes(rows @ key, rows), key)


def test_no_other_rotation_is_nearer() -> None:
    a, b = draw(40, 8), draw(40, 8, seed=1)
    best = (a - b @ procrustes(a, b)).norm()
    assert all((a - b @ polar(draw(8, 8, seed=seed))).norm() > best for seed in range(2, 20))


def test_success_of_a_key() -> None:
    key, other = polar(draw(64, 64)), polar(draw(64, 64, seed=1))
    assert key_success(key, key) == pytest.approx(1)
    assert key_success(other, key) < 0.1
    assert key_success(0.9 * other, key) == pytest.approx(key_success(other, key))


def test_nearest_by_cosine() -> None:
    table = draw(30, 8)
    assert torch.equal(nearest(7 * table[[3, 9]], table), torch.tensor([3, 9]))
