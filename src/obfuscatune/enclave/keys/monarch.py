"""Monarch keys: R = P0 B1 P1 B2 P2, two rounds of Haar blocks between secret permutations.

With blocks of size b a product costs 2 n b multiply-adds per row instead of n^2. R is orthogonal, so the inverse and
the backward are the transpose. Source: Dao et al., "Monarch", arXiv 2204.00595; their permutations are fixed, ours
are secret.

An entry of R is exactly 0 where its two blocks share no feature, a share of about exp(-b^2 / n): .5 % at n = 768, 26 %
at n = 3072, both with b = 64. Larger blocks lower it.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from obfuscatune.enclave.keys.base import Factors, OrthogonalKey, check_orthogonal_blocks
from obfuscatune.enclave.keys.orthogonal import HaarKey, haar, haar_blocks
from obfuscatune.enclave.keys.source import Stream
from obfuscatune.errors import UsageError
from obfuscatune.protocol.cpu import widened_from

# Up to so many rows two row-major rounds are faster: a batched product from the right takes 9 us there, and one from
# the left 30. For 4 rows of 768 a product takes 28 us so, else 61; from 16 rows on 60 (AMD EPYC, 1 thread, torch 2.13).
FEW_ROWS = 8

Blocks = tuple[Tensor, ...]  # block-diagonal: groups of equal blocks [count, b, b], at most one group of one odd block


class MonarchKey(OrthogonalKey):
    """x P0 B1 P1 B2 P2 with x P = x[:, p].

    Many rows go through the first blocks into the feature-major layout [size, rows], where the middle permutation moves
    contiguous rows, and come back through the second blocks. This beats two row-major rounds by up to a fifth, and
    torch's x[:, p], for which index_select is four times faster, by half. For a few rows it does not, see `FEW_ROWS`.

    Args:
        first: the blocks of B1^T. Transposed, so that both directions use the same contiguous factors.
        second: the blocks of B2.
        permutations: p0, p1, p2, int64 [size] each.
    """

    family = "monarch"

    def __init__(self, first: Blocks, second: Blocks, permutations: tuple[Tensor, Tensor, Tensor]) -> None:
        for blocks in (*first, *second):
            check_orthogonal_blocks(self.family, blocks)
        self._groups = len(first)
        inverses = tuple(p.argsort() for p in reversed(permutations))
        super().__init__(
            len(permutations[0]),
            (*first, *second, *permutations, *inverses),
        )

    def _compute_dtype(self, rows: Tensor) -> torch.dtype:
        """As every key, but many bfloat16 rows in bfloat16 where that is faster: see `_by_features`."""
        if rows.dtype != torch.bfloat16 or len(rows) <= FEW_ROWS:
            return super()._compute_dtype(rows)
        widened = rows.is_cpu and widened_from(rows.dtype) is not None
        return torch.float32 if widened else torch.bfloat16

    def _product(self, x: Tensor, factors: Factors) -> Tensor:
        g = self._groups
        return _rounds(x)(x, factors[:g], factors[g : 2 * g], factors[2 * g : 2 * g + 3])

    def _transpose(self, x: Tensor, factors: Factors) -> Tensor:
        g = self._groups  # R^T = P2^T B2^T P1^T B1^T P0^T: the first blocks, transposed, are those of B2
        return _rounds(x)(x, factors[g : 2 * g], factors[:g], factors[2 * g + 3 :])


def _rounds(x: Tensor) -> Callable[[Tensor, Blocks, Blocks, Factors], Tensor]:
    if len(x) <= FEW_ROWS:
        return _by_rows
    return _by_features if x.dtype == torch.bfloat16 else _sandwich


def _by_features(x: Tensor, first: Blocks, second: Blocks, permutations: Factors) -> Tensor:
    """Both rounds in the layout [size, rows], for bfloat16: 512 rows of 768 take .9 ms, and 1.8 in float32.

    Where the CPU has no faster products in bfloat16 than in float32, float32 is faster by 5 to 25 % and more exact.
    Blocks and the numbers between the rounds are rounded to bfloat16 too, so a product is off by .36 %, where rounding
    its result alone is .17 %. What that does to logits is in `tests/exactness/test_bfloat16.py`.
    """
    p0, p1, p2 = permutations
    x = _round_of_features(x.T.index_select(0, p0), first)
    x = _round_of_features(x.index_select(0, p1), tuple(block.mT for block in second))
    return x.index_select(0, p2).T.contiguous()


def _round_of_features(x: Tensor, blocks: Blocks) -> Tensor:
    """A block-diagonal matrix times columns [size, rows]."""
    return _join([torch.bmm(b, part).flatten(0, 1) for b, part in _parts(x, blocks, 0)], 0)


def _by_rows(x: Tensor, first: Blocks, second: Blocks, permutations: Factors) -> Tensor:
    p0, p1, p2 = permutations
    x = _round(x.index_select(1, p0), tuple(block.mT for block in first))
    return _round(x.index_select(1, p1), second).index_select(1, p2)


def _round(x: Tensor, blocks: Blocks) -> Tensor:
    """Rows [rows, size] times a block-diagonal matrix."""
    return _join([torch.bmm(part.transpose(0, 1), b).transpose(0, 1).flatten(1) for b, part in _parts(x, blocks, 1)], 1)


def _sandwich(x: Tensor, first: Blocks, second: Blocks, permutations: Factors) -> Tensor:
    p0, p1, p2 = permutations
    x = x.index_select(1, p0)  # [rows, size]
    x = _join([torch.bmm(b, part.permute(1, 2, 0)).flatten(0, 1) for b, part in _parts(x, first, dim=1)], dim=0)
    x = x.index_select(0, p1)  # [size, rows]
    x = _join([torch.bmm(part.mT, b).transpose(0, 1).flatten(1) for b, part in _parts(x, second, dim=0)], dim=1)
    return x.index_select(1, p2)  # [rows, size]


def _parts(x: Tensor, blocks: Blocks, dim: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Each group of blocks [count, b, b] with its slice of x, whose feature axis ``dim`` is split in (count, b)."""
    if len(blocks) == 1:  # as a rule; the rest would cost as much as the product of a few rows
        yield blocks[0], torch.unflatten(x, dim, blocks[0].shape[:2])
        return
    for group, part in zip(blocks, torch.split(x, [len(g) * g.shape[1] for g in blocks], dim), strict=True):
        yield group, torch.unflatten(part, dim, group.shape[:2])


def _join(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)  # torch.cat copies even a single part


def block_sizes(n: int, block: int) -> list[int]:
    """Sizes of the blocks of a Monarch key of size n with blocks of about ``block``; one, n, where it would be dense.

    The block size is the one of [block / 2, 3 block / 2] nearest to ``block`` that divides n; if none does, the one
    that leaves the largest remainder, which becomes one smaller block.
    Raises: `UsageError` if ``block`` is below 2: blocks of 1 would only permute and flip signs.
    """
    if block < 2:
        raise UsageError("Monarch blocks are too small", got=block, expected="at least 2")
    candidates = range(max(2, (block + 1) // 2), block * 3 // 2 + 1)
    size = min(candidates, key=lambda b: (-n % b, abs(b - block)))
    if n <= max(block, size):
        return [n]
    count, rest = divmod(n, size)
    return [size] * count + ([rest] if rest else [])


def monarch(stream: Stream, n: int, block: int = 64) -> MonarchKey | HaarKey:
    """A Monarch key of size n with the blocks of :func:`block_sizes`, or a `HaarKey` where one is all of it.

    Permutations are uniform on all n! orders. Raises: `UsageError` if ``block`` is below 2.
    """
    size, *others = block_sizes(n, block)
    if not others:
        return haar(stream, n)
    count, rest = divmod(n, size)
    first, second = (
        (haar_blocks(stream, count, size), *([haar_blocks(stream, 1, rest)] if rest else [])) for _ in range(2)
    )
    p0, p1, p2 = (stream.permutation(n) for _ in range(3))
    return MonarchKey(first, second, (p0, p1, p2))
