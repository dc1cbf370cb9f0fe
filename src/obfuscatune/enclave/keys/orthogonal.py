"""Dense Haar keys: the uniform distribution on the orthogonal group.

Source: F. Mezzadri, "How to generate random matrices from the classical compact groups", Notices AMS 54 (2007).
"""

import torch
from torch import Tensor

from obfuscatune.enclave.keys.base import Factors, OrthogonalKey, check_orthogonal_blocks
from obfuscatune.enclave.keys.source import Stream


class HaarKey(OrthogonalKey):
    """x R with a dense orthogonal R, float64 [size, size]: size^2 multiply-adds per row.

    Raises: `KeyFaultError` if the matrix is not orthogonal.
    """

    family = "haar"

    def __init__(self, matrix: Tensor) -> None:
        check_orthogonal_blocks(self.family, matrix)
        super().__init__(len(matrix), (matrix,))

    def _product(self, x: Tensor, factors: Factors) -> Tensor:
        return x @ factors[0]

    def _transpose(self, x: Tensor, factors: Factors) -> Tensor:
        return x @ factors[0].mT


def haar_blocks(stream: Stream, count: int, n: int) -> Tensor:
    """``count`` independent Haar matrices, float64 [count, n, n]: Q sign(diag R) where G = Q R and G is Gaussian.

    Without the signs Q follows the convention of the QR routine, not Haar: LAPACK's has a diagonal of negative mean.
    """
    q, r = torch.linalg.qr(stream.normal(count, n, n))
    signs: Tensor = r.diagonal(dim1=-2, dim2=-1).sign()
    blocks: Tensor = q * signs.unsqueeze(-2)
    return blocks.contiguous()  # LAPACK's Q is column-major, on which small products take twice as long


def haar(stream: Stream, n: int) -> HaarKey:
    """A Haar key of size n. Cost: one float64 QR, about 4/3 n^3 multiply-adds."""
    return HaarKey(haar_blocks(stream, 1, n)[0])
