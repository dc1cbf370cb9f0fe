"""Permutation keys: x R = x[..., p]. They commute with every elementwise function, and hide nothing but the order."""

from torch import Tensor

from obfuscatune.enclave.keys.base import Factors, OrthogonalKey
from obfuscatune.enclave.keys.source import Stream


class PermutationKey(OrthogonalKey):
    """x[..., order], with order int64 [size]: no multiply-adds. Leaks the multiset of each row's values."""

    family = "permutation"

    def __init__(self, order: Tensor) -> None:
        super().__init__(len(order), (order, order.argsort()))

    def _product(self, x: Tensor, factors: Factors) -> Tensor:
        return x.index_select(1, factors[0])

    def _transpose(self, x: Tensor, factors: Factors) -> Tensor:
        return x.index_select(1, factors[1])


def permutation(stream: Stream, n: int) -> PermutationKey:
    """A uniform secret permutation of n features."""
    return PermutationKey(stream.permutation(n))
