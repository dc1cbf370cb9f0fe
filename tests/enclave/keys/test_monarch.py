"""Monarch keys: orthogonal at every size, cheap, and mixing everything: neither block-diagonal nor Kronecker."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from obfuscatune.enclave.keys import HaarKey, MasterSecret, MonarchKey, monarch
from obfuscatune.enclave.keys.monarch import FEW_ROWS
from obfuscatune.errors import KeyFaultError, UsageError

PRODUCT = 1e-13  # float64, rows of size 1; measured 2.3e-15
ORTHOGONALITY = 1e-13  # float64; measured 1.6e-15


@given(st.integers(1, 150), st.integers(2, 20), st.integers(0, 100))
@settings(deadline=None, max_examples=50)
def test_every_size_is_orthogonal(n: int, block: int, seed: int) -> None:
    key = monarch(MasterSecret.from_insecure_test_seed(seed).stream("m"), n, block)
    r = key.dense()
    assert (r @ r.T - torch.eye(n)).abs().max().item() < ORTHOGONALITY
    assert key.size == n


@pytest.mark.parametrize(
    ("n", "block", "sizes"),
    [
        (768, 64, [64] * 12),
        (770, 64, [70] * 11),  # 64 does not divide it, 70 does
        (37, 8, [8, 8, 8, 8, 5]),  # a prime
        (7, 2, [2, 2, 2, 1]),
    ],
)
def test_block_sizes(master: MasterSecret, n: int, block: int, sizes: list[int]) -> None:
    key = monarch(master.stream("m"), n, block)
    assert isinstance(key, MonarchKey)
    assert [size for group in key._factors[: key._groups] for size in [group.shape[1]] * len(group)] == sizes


@pytest.mark.parametrize(("n", "block"), [(1, 64), (7, 64), (64, 64), (80, 64), (10, 8)])
def test_one_block_is_a_dense_haar_key(master: MasterSecret, n: int, block: int) -> None:
    assert isinstance(monarch(master.stream("m"), n, block), HaarKey)


def test_is_the_product_of_its_factors(master: MasterSecret) -> None:
    key = monarch(master.stream("m"), 37, 8)
    assert isinstance(key, MonarchKey)
    first = torch.block_diag(*key._factors[0], *key._factors[1])
    second = torch.block_diag(*key._factors[2], *key._factors[3])
    p0, p1, p2 = (torch.eye(37, dtype=torch.float64)[:, p] for p in key._factors[4:7])
    assert torch.allclose(key.dense(), p0 @ first.T @ p1 @ second @ p2, rtol=0, atol=1e-14)


@given(st.integers(0, 2 * FEW_ROWS), st.integers(5, 90), st.integers(2, 9))
@settings(deadline=None, max_examples=60)
def test_few_rows_and_many_are_the_same_products(rows: int, n: int, block: int) -> None:
    key = monarch(MasterSecret.from_insecure_test_seed(n).stream("m"), n, block)
    x = torch.randn(rows, n, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))
    r = key.dense() if n > FEW_ROWS else torch.cat([key.apply(row[None]) for row in torch.eye(n, dtype=torch.float64)])
    assert torch.allclose(key.apply(x), x @ r, rtol=0, atol=PRODUCT)
    assert torch.allclose(key.apply_inverse(x), x @ r.T, rtol=0, atol=PRODUCT)


def kronecker_error(r: torch.Tensor, block: int) -> float:
    """Relative distance of r to the nearest A (x) B with B [block, block]: the best rank 1 of its rearrangement."""
    count = len(r) // block
    rearranged = r.view(count, block, count, block).transpose(1, 2).reshape(count**2, block**2)
    singular = torch.linalg.svdvals(rearranged)
    return (singular[1:].norm() / singular.norm()).item()


def zero_share(r: torch.Tensor) -> float:
    return (r == 0).double().mean().item()


def test_is_neither_block_diagonal_nor_kronecker(master: MasterSecret) -> None:
    stream = master.stream("m")
    n, block = 96, 32
    r = monarch(stream, n, block).dense()
    assert zero_share(r) == 0  # each pair of blocks shares about block^2 / n = 10.7 features
    assert kronecker_error(r, block) > 0.9
    small = [monarch(stream, block, block).dense() for _ in range(3)]
    assert zero_share(torch.block_diag(*small)) == pytest.approx(2 / 3)  # control: what a bare block-diagonal key shows
    assert kronecker_error(torch.kron(torch.eye(3), small[0]), block) < 1e-12  # control: a Kronecker key


def test_permutations_and_blocks_are_all_different(master: MasterSecret) -> None:
    key = monarch(master.stream("m"), 64, 8)
    assert isinstance(key, MonarchKey)
    blocks = torch.cat(key._factors[:2])
    overlaps = torch.einsum("aij,bij->ab", blocks, blocks) - 8 * torch.eye(16)
    assert overlaps.abs().max().item() < 6  # trace of a Haar matrix: mean 0, variance 1; 8 for equal blocks
    permutations = key._factors[2:5]
    assert len({tuple(p.tolist()) for p in (*permutations, torch.arange(64))}) == 4


def test_a_spoiled_block_is_refused(master: MasterSecret) -> None:
    key = monarch(master.stream("m"), 16, 4)
    blocks, permutations = key._factors[0].clone(), key._factors[2:5]
    blocks[1, 0, 0] += 1e-3
    with pytest.raises(KeyFaultError, match="monarch key is not orthogonal"):
        MonarchKey((blocks,), (key._factors[1],), permutations)  # type: ignore[arg-type]


def test_blocks_of_one_are_refused(master: MasterSecret) -> None:
    with pytest.raises(UsageError, match="too small"):
        monarch(master.stream("m"), 16, 1)


@given(st.integers(9, 40), st.sampled_from([64, 70, 97]), st.integers(0, 50))
@settings(max_examples=20)
def test_many_bfloat16_rows_are_close_to_the_dense_product(rows: int, size: int, seed: int) -> None:
    """Rounded blocks and numbers between the rounds: relative to a row's norm at most 1 %; measured .5 %."""
    key = monarch(MasterSecret.from_insecure_test_seed(seed).stream("key"), size, 8)
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    dense = key.dense()
    for product, matrix in ((key.apply, dense), (key.apply_inverse, dense.T)):
        y = product(x)
        assert y.dtype == torch.bfloat16 and y.is_contiguous()
        gap = (y.double() - x.double() @ matrix).norm(dim=1) / x.double().norm(dim=1)
        assert 0 < gap.max() < 0.01
