"""Whether a plain tensor can be found among what the worker saw: its rows or columns, up to scale, sign and order.

Rows and columns become unit vectors. A plain vector p is found *as it is* where a seen vector s has |p - s| or |p + s|
at most `TOLERANCE`, and *up to order* where their sorted magnitudes differ by at most `ORDER_TOLERANCE`, whatever
permutation and signs were applied. Vectors that say too little (short, nearly constant, mostly zero) are left out:
anything would match them.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

# Copies in float32 differ by 1e-6 (under `naive`, 1e-4), ones rounded to bfloat16 by 2e-3. Sorted magnitudes of
# unrelated vectors differ by .1 only and have few degrees of freedom: at 4e-3 some of 1e8 pairs match by chance, at
# 5e-4 none.
TOLERANCE = 4e-3
ORDER_TOLERANCE = 5e-4
# A matrix in another order matches in nearly all of its columns. Single ones can match for another reason: where the
# gradient of a head's q, k or v is nearly of rank one (measured: second singular value 2 % of the first), its columns
# are nearly parallel, and so is every keyed mixture of them. Then 2 of 384 columns were found. docs/design.md says so.
# And where a gate hardly varies, its neuron's activation is a multiple of up's column: 2 of 129.
MIN_SHARE = 0.02
MIN_LENGTH = 24
MIN_SPREAD = 0.2  # standard deviation of the magnitudes over their root mean square
MIN_STEPS = 8  # distinct magnitudes of a telling vector: steps between sorted neighbours that exceed the tolerance

Vectors = dict[int, Tensor]  # by length n: unit vectors [count, n], float64
AS_IT_IS, UP_TO_ORDER = "as it is", "up to order"


def vectors_of(tensors: Iterable[Tensor], *, columns: bool = True) -> Vectors:
    """All different telling rows, and columns, of the tensors, seen as matrices with the last axis as it is."""
    found: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.is_complex() or tensor.ndim == 0 or not tensor.numel():
            continue
        matrix = tensor.detach().double().reshape(-1, tensor.shape[-1])
        for rows in (matrix, matrix.T) if columns else (matrix,):
            if rows.shape[1] >= MIN_LENGTH:
                found.setdefault(rows.shape[1], []).append(rows)
    telling = {n: _telling(torch.cat(parts)) for n, parts in found.items()}
    return {n: vectors.unique(dim=0) for n, vectors in telling.items() if vectors.numel()}


def _telling(rows: Tensor) -> Tensor:
    rows = rows[rows.isfinite().all(dim=1)]
    norms = rows.norm(dim=1, keepdim=True)
    rows = (rows / norms)[norms[:, 0] > 0]
    magnitudes = rows.abs().sort(dim=1).values
    steps = (magnitudes.diff(dim=1) > TOLERANCE / rows.shape[1] ** 0.5).sum(dim=1)
    spread = (1 - rows.shape[1] * magnitudes.mean(dim=1) ** 2).clamp(min=0).sqrt()  # of unit vectors
    return rows[(steps >= MIN_STEPS) & (spread >= MIN_SPREAD)]


def search(plain: Mapping[str, Sequence[Tensor]], seen: Iterable[Tensor]) -> dict[str, str]:
    """Return, for each name of which any vector is found, how: `AS_IT_IS` or `UP_TO_ORDER`.

    A column that is found tells a matrix up to the order of its columns, so only a row counts as it is.
    """
    haystack = vectors_of(seen)
    sorted_haystack = {n: vectors.abs().sort(dim=1).values for n, vectors in haystack.items()}
    result: dict[str, str] = {}
    for name, tensors in plain.items():
        rows = vectors_of(tensors, columns=False)
        if any(_close(needles, haystack.get(n), TOLERANCE) for n, needles in rows.items()):
            result[name] = AS_IT_IS
        elif any(
            _close(needles, haystack.get(n), TOLERANCE, share=MIN_SHARE)
            or _close(needles.abs().sort(dim=1).values, sorted_haystack.get(n), ORDER_TOLERANCE, share=MIN_SHARE)
            for n, needles in vectors_of(tensors).items()
        ):
            result[name] = UP_TO_ORDER
    return result


def _close(needles: Tensor, haystack: Tensor | None, tolerance: float, *, share: float = 0.0) -> bool:
    if haystack is None:
        return False
    # |p - s|^2 = 2 - 2 p.s for unit vectors, in float64: 1e-16 is far below the square of the tolerance.
    least = 1 - tolerance**2 / 2
    found = 0
    for part in needles.split(2048):
        lowest, highest = (part @ haystack.T).aminmax(dim=1)
        found += int((torch.maximum(-lowest, highest) >= least).sum())
    return found > share * len(needles)
