"""Freivalds' check in the field: ``X (W v) = Y v mod p`` for secret uniform v, exactly and without a tolerance.

A row of a product that is wrong in the residues of any one prime passes with a chance of 1 / p for each vector, so
`vectors_of` a scheme make it 2^-40 at most, whatever the workers do, all of them together included. The
vectors are kept as long as nothing is told about them but "all was right": the session ends at the first fault.
Source: Freivalds, "Probabilistic machines can use less running time", IFIP 1977.
"""

import torch
from torch import Tensor

from obfuscatune.enclave.keys.source import Secret
from obfuscatune.enclave.sharing.scheme import Scheme, lift_factor
from obfuscatune.enclave.sharing.uniform import Uniform
from obfuscatune.protocol.residues import centred

_BITS = 40


def vectors_of(scheme: Scheme) -> int:
    """How many vectors each prime has: six, and seven with the small prime."""
    return next(k for k in range(1, 64) if min(scheme.primes) ** k >= 2**_BITS)


class FieldCheck(Secret):
    """The vectors of one weight's products, forward and with the transpose.

    Args:
        integers: of the weight, float64 ``[in, out]``. count: vectors for each prime, `vectors_of` the scheme where
            None; 0 checks nothing.
    """

    def __init__(self, integers: Tensor, scheme: Scheme, uniform: Uniform, count: int | None = None) -> None:
        count = vectors_of(scheme) if count is None else count
        self._sides: list[tuple[Tensor, Tensor]] | None = []
        for matrix in (integers, integers.T):
            vectors = uniform.draw(scheme, count, matrix.shape[1]).to(torch.int16)
            # Below 2^26.4 * 125 a term, of seven primes: sums of 2^17.1 (MOST_TERMS) are below 2^51, so exact.
            images = (vectors.double() @ matrix.T).long()
            residues = [
                centred(centred(plane, p) * lift_factor(scheme, p), p).to(torch.int16)
                for plane, p in zip(images, scheme.primes, strict=True)
            ]
            self._sides.append((torch.stack(residues), vectors))

    def sides(self, *, transpose: bool) -> tuple[Tensor, Tensor] | None:
        """``W v (M / p)^-1`` ``[L, count, in]`` and v ``[L, count, out]``, int16; None after a fault."""
        return None if self._sides is None else self._sides[transpose]

    def discard(self) -> None:
        """Forget the vectors, after a fault."""
        self._sides = None
