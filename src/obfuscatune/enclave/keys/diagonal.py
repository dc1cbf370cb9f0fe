"""Permutation and diagonal in one: the key of a gated MLP's up branch, ``x R = (x D)[..., p]``."""

import torch
from torch import Tensor

from obfuscatune.enclave.keys.base import Factors, Key
from obfuscatune.enclave.keys.permutation import PermutationKey
from obfuscatune.enclave.keys.source import Stream


class ScaledPermutationKey(Key):
    """``(x * scale)[..., order]`` with scale float64 [size], nonzero, and order int64 [size]."""

    family = "scaled permutation"

    def __init__(self, scale: Tensor, order: Tensor) -> None:
        lengths = scale.abs()
        singular = (lengths.min().item(), lengths.max().item())
        super().__init__(len(order), (scale, 1 / scale, order, order.argsort()), singular_range=singular)

    def _product(self, x: Tensor, factors: Factors) -> Tensor:
        return (x * factors[0]).index_select(1, factors[2])

    def _transpose(self, x: Tensor, factors: Factors) -> Tensor:
        return x.index_select(1, factors[3]) * factors[0]

    def _inverse(self, x: Tensor, factors: Factors) -> Tensor:
        return x.index_select(1, factors[3]) * factors[1]

    def _inverse_transpose(self, x: Tensor, factors: Factors) -> Tensor:
        return (x * factors[1]).index_select(1, factors[2])


def gated_keys(stream: Stream, n: int, *, permute: bool) -> tuple[PermutationKey, ScaledPermutationKey]:
    """Keys P of the gate branch and D P of the up branch: ``act(g P) * (u D P) = (act(g) * u) D P``.

    Entries of D have random signs and sizes from 1/2 to 2. With ``permute`` false P and D are the identity.
    """
    if not permute:
        order = torch.arange(n)
        return PermutationKey(order), ScaledPermutationKey(torch.ones(n, dtype=torch.float64), order)
    order = stream.permutation(n)
    scale = stream.signs(n) * 2 ** (2 * stream.uniform(n) - 1)
    return PermutationKey(order), ScaledPermutationKey(scale, order)
