"""Per-head attention keys: a secret block for each head, then a secret order of the heads, and their concatenation.

Attention with q M, k M^-T and v N has the same logits, (q M)(k M^-T)^T = q k^T, and its output is that of v times N, so
the worker runs stock attention on keyed heads. The three share one order of heads: q, k and v of a head must meet.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from obfuscatune.enclave.keys.base import Factors, Key
from obfuscatune.enclave.keys.conditioned import conditioned_blocks
from obfuscatune.enclave.keys.source import Stream
from obfuscatune.errors import KeyFaultError, UsageError

INVERSE_TOLERANCE = 1e-9  # max |B B^-1 - I| in float64; measured 1.3e-15 at head_dim 64 and 128, kappa 4


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
            multiply_adds=blocks.numel(),
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


def per_head(stream: Stream, heads: int, head_dim: int, kappa: float) -> tuple[PerHeadKey, PerHeadKey, PerHeadKey]:
    """Keys (q, k, v) with blocks M, M^-T and N of condition number kappa per head, and one shared order of heads.

    Secrecy: M and N are independent, so that neither q k^T nor the value path gives the other.
    """
    order = stream.permutation(heads)
    m, m_inverse = conditioned_blocks(stream, heads, head_dim, kappa)
    n, n_inverse = conditioned_blocks(stream, heads, head_dim, kappa)
    return PerHeadKey(m, m_inverse, order), PerHeadKey(m_inverse.mT, m.mT, order), PerHeadKey(n, n_inverse, order)


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
            multiply_adds=sum(key.multiply_adds for key in keys),
        )

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
