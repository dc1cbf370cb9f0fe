"""Dense keys that are not orthogonal: of a prescribed condition number, and the ill-conditioned Gaussian of `naive`."""

import math

import torch
from torch import Tensor

from obfuscatune.enclave.keys.base import Factors, Key
from obfuscatune.enclave.keys.orthogonal import haar_blocks
from obfuscatune.enclave.keys.source import Stream
from obfuscatune.errors import KeyFaultError, UsageError


class DenseKey(Key):
    """x R with a dense R and a given R^-1, both float64 [size, size]: size^2 multiply-adds per row.

    Args:
        family: the name shown in ``repr``.
        singular_range: smallest and largest singular value of R, as in `Key`.
    """

    def __init__(self, family: str, matrix: Tensor, inverse: Tensor, singular_range: tuple[float, float]) -> None:
        self.family = family
        super().__init__(len(matrix), (matrix, inverse), singular_range=singular_range)

    def _product(self, x: Tensor, factors: Factors) -> Tensor:
        return x @ factors[0]

    def _transpose(self, x: Tensor, factors: Factors) -> Tensor:
        return x @ factors[0].mT

    def _inverse(self, x: Tensor, factors: Factors) -> Tensor:
        return x @ factors[1]

    def _inverse_transpose(self, x: Tensor, factors: Factors) -> Tensor:
        return x @ factors[1].mT


def conditioned_blocks(stream: Stream, count: int, n: int, kappa: float) -> tuple[Tensor, Tensor]:
    """``count`` independent M = QA S QB and their inverses QB^T S^-1 QA^T, float64 [count, n, n] each.

    QA and QB are Haar, S is geometrically spaced from sqrt(kappa) to 1 / sqrt(kappa), so that det M = +-1 and
    cond M = kappa (1 if n = 1). A secret order of S would change nothing: Haar matrices already absorb permutations.
    Raises: `UsageError` unless 1 <= kappa < infinity.
    """
    if not (math.isfinite(kappa) and kappa >= 1):
        raise UsageError("a condition number is impossible", got=kappa, expected="finite and at least 1")
    half = math.log(kappa) / 2 if n > 1 else 0.0
    s = torch.linspace(half, -half, n, dtype=torch.float64).exp()
    qa, qb = haar_blocks(stream, count, n), haar_blocks(stream, count, n)
    return (qa * s) @ qb, (qb.mT / s) @ qa.mT


def conditioned(stream: Stream, n: int, kappa: float) -> DenseKey:
    """A dense key of condition number kappa, with its inverse from the factors; see `conditioned_blocks`.

    Source: the paper's Appendix B prescribes the condition number; the geometric spacing is our choice.
    """
    matrices, inverses = conditioned_blocks(stream, 1, n, kappa)
    root = math.sqrt(kappa) if n > 1 else 1.0
    return DenseKey("conditioned", matrices[0], inverses[0], (1 / root, root))


def gaussian(stream: Stream, n: int) -> DenseKey:
    """Entries N(0, 1 / n): the key of profile `naive`, whose condition number is of order n and computed here.

    Its inverse is numerical, a float64 solve, so results lose about log10(condition number) digits.
    Raises: `KeyFaultError` if the matrix is singular.
    """
    matrix = stream.normal(n, n) / math.sqrt(n)
    singular = torch.linalg.svdvals(matrix)
    inverse, info = torch.linalg.inv_ex(matrix)
    if info.item() != 0:
        raise KeyFaultError("a gaussian key is singular", hint="derive it under another name or epoch")
    return DenseKey("gaussian", matrix, inverse, (singular[-1].item(), singular[0].item()))
