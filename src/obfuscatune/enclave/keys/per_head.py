"""Per-head attention keys: a secret block for each head, then a secret order of the heads, and their concatenation.

Attention with q M, k M^-T and v N has the same logits, (q M)(k M^-T)^T = q k^T, and its output is that of v times N, so
the worker runs stock attention on keyed heads, grouped ones and rotated ones too.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from obfuscatune.enclave.keys.base import Factors, Key
from obfuscatune.enclave.keys.conditioned import conditioned_blocks
from obfuscatune.enclave.keys.source import Stream
from obfuscatune.errors import KeyFaultError, UsageError

INVERSE_TOLERANCE = 1e-9  # max |B B^-1 - I| in float64; measured 1.3e-15 at head_dim 64 and 128, kappa 4

LEAST_ANGLE = 0.05  # radians between a plane's turn and a multiple of a quarter turn


class PerHeadKey(Key):
    """R = diag(B_0 .. B_{h-1}) P: output head j is input head order[j] times B_order[j].

    Args:
        blocks: B, float64 [heads, head_dim, head_dim], by input head.
        inverses: their inverses, from the factors, same shape.
        order: int64 [heads].

    Raises: `KeyFaultError` if a block times its inverse is not the identity.
    """

    family = "per_head"

    def __init__(self, blocks: Tensor, inverses: Tensor, order: Tensor) -> None:
        heads, head_dim, _ = blocks.shape
        error = (blocks @ inverses - torch.eye(head_dim, dtype=blocks.dtype)).abs().max().item()
        if not error <= INVERSE_TOLERANCE:
            raise KeyFaultError("a per-head key has a wrong inverse", got=f"{error:.1e}", expected=INVERSE_TOLERANCE)
        singular = torch.linalg.svdvals(blocks)
        super().__init__(
            heads * head_dim,
            (blocks[order], inverses[order], order, order.argsort()),  # blocks by output head, where they are applied
            singular_range=(singular.min().item(), singular.max().item()),
        )

    def _product(self, x: Tensor, factors: Factors) -> Tensor:
        blocks, _, order, _ = factors
        return _by_head(torch.unflatten(x, 1, blocks.shape[:2]).index_select(1, order), blocks).flatten(1)

    def _inverse_transpose(self, x: Tensor, factors: Factors) -> Tensor:
        blocks, inverses, order, back = factors
        return self._product(x, (inverses.mT, blocks.mT, order, back))

    def _inverse(self, x: Tensor, factors: Factors) -> Tensor:
        _, inverses, _, back = factors
        return _by_head(torch.unflatten(x, 1, inverses.shape[:2]), inverses).index_select(1, back).flatten(1)

    def _transpose(self, x: Tensor, factors: Factors) -> Tensor:
        blocks, inverses, order, back = factors
        return self._inverse(x, (inverses.mT, blocks.mT, order, back))


def _by_head(x: Tensor, blocks: Tensor) -> Tensor:
    """Return x [rows, heads, head_dim] times one block per head."""
    return torch.bmm(x.transpose(0, 1), blocks).transpose(0, 1)


@dataclass(frozen=True, slots=True)
class HeadKeys:
    """Keys of one attention: of q, k and v as its first layers give them, and of the heads' output."""

    q: Key
    k: Key
    v: Key
    output: Key


def head_keys(stream: Stream, *, heads: int, kv_heads: int, head_dim: int, rotary: int, kappa: float) -> HeadKeys:
    r"""Keys M of q, M^-T of k and N of v, per kv head g and shared by its query heads; secret orders of both.

    ``(q M_g)(k M_g^-T)^T = q k^T``, and the output of a head is that of v times N_g. Groups are permuted, and the query
    heads within each: head j of the worker still belongs to its kv head ``j // (heads / kv_heads)``.

    Where the first ``rotary`` numbers of a head are rotated by position, M must commute with every rotation of the
    planes ``(i, i + rotary / 2)``: there it is one complex factor a plane, z on q and ``1 / conj(z)`` on k.
    Elsewhere it is any matrix. Condition numbers are at most kappa.

    Secrecy: M and N are independent, so that neither q k^T nor the value path gives the other.
    """
    share = heads // kv_heads
    groups = stream.permutation(kv_heads)
    order = torch.cat([group * share + stream.permutation(share) for group in groups])
    m, m_inverse = _commuting(stream, kv_heads, head_dim, rotary, kappa)
    n, n_inverse = conditioned_blocks(stream, kv_heads, head_dim, kappa)
    each = torch.arange(kv_heads).repeat_interleave(share)
    return HeadKeys(
        q=PerHeadKey(m[each], m_inverse[each], order),
        k=PerHeadKey(m_inverse.mT, m.mT, groups),
        v=PerHeadKey(n, n_inverse, groups),
        output=PerHeadKey(n[each], n_inverse[each], order),
    )


def _commuting(stream: Stream, count: int, size: int, rotary: int, kappa: float) -> tuple[Tensor, Tensor]:
    """Return M and its inverse ``[count, size, size]``: complex factors on the rotated planes, any matrix elsewhere."""
    if not rotary:
        return conditioned_blocks(stream, count, size, kappa)
    half = rotary // 2
    # Near a multiple of a quarter turn the plane's columns would be plain ones, up to scale and order.
    quarters = 4 * stream.uniform(count, half)
    angle = quarters.floor() * math.pi / 2 + LEAST_ANGLE + quarters.frac() * (math.pi / 2 - 2 * LEAST_ANGLE)
    length = (math.log(kappa) * (stream.uniform(count, half) - 0.5)).exp()  # within sqrt(kappa) and its inverse
    blocks = torch.zeros(2, count, size, size, dtype=torch.float64)
    i = torch.arange(half)
    # A row (x, y) times z = a + ib is (a x - b y, b x + a y); the inverse turns back.
    for target, scale, sense in zip(blocks, (length, 1 / length), (1, -1), strict=True):
        real, imaginary = scale * angle.cos(), sense * scale * angle.sin()
        target[:, i, i] = target[:, i + half, i + half] = real
        target[:, i, i + half], target[:, i + half, i] = imaginary, -imaginary
    if rest := size - rotary:
        blocks[0, :, rotary:, rotary:], blocks[1, :, rotary:, rotary:] = conditioned_blocks(stream, count, rest, kappa)
    return blocks[0], blocks[1]


class ConcatKey(Key):
    """R = diag(R_0, R_1, ...): independent keys on consecutive slices, as for a fused [q | k | v] axis."""

    family = "concat"

    def __init__(self, keys: Sequence[Key]) -> None:
        if not keys:
            raise UsageError("a concatenation of keys is empty")
        self._keys = tuple(keys)
        smallest, largest = zip(*(key.singular_range for key in keys), strict=True)
        super().__init__(
            sum(key.size for key in keys),
            (),
            singular_range=(min(smallest), max(largest)),
        )

    @property
    def parts(self) -> tuple[Key, ...]:
        """R_0, R_1, ..."""
        return self._keys

    def _product(self, x: Tensor, factors: Factors) -> Tensor:
        return self._each(x, lambda key: key.apply)

    def _transpose(self, x: Tensor, factors: Factors) -> Tensor:
        return self._each(x, lambda key: key.apply_transpose)

    def _inverse(self, x: Tensor, factors: Factors) -> Tensor:
        return self._each(x, lambda key: key.apply_inverse)

    def _inverse_transpose(self, x: Tensor, factors: Factors) -> Tensor:
        return self._each(x, lambda key: key.apply_inverse_transpose)

    def _each(self, x: Tensor, product: Callable[[Key], Callable[[Tensor], Tensor]]) -> Tensor:
        parts = torch.split(x, [key.size for key in self._keys], dim=1)
        return torch.cat([product(key)(part) for key, part in zip(self._keys, parts, strict=True)], dim=1)
