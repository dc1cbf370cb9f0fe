"""Linear algebra that several attacks share."""

import torch
from torch import Tensor


def procrustes(a: Tensor, b: Tensor) -> Tensor:
    """Return the orthogonal Q ``[n, n]`` that minimizes ``|a - b Q|_F``, a and b ``[rows, n]`` (Schönemann 1966)."""
    u, _, v = torch.linalg.svd(b.mT @ a, full_matrices=False)
    return u @ v  # type: ignore[no-any-return]


def relative_error(guess: Tensor, truth: Tensor, scale: Tensor | None = None) -> float:
    """Return ``|guess - truth|_F / |scale|_F``; scale is the truth by default."""
    return ((guess - truth).norm() / (truth if scale is None else scale).norm().clamp_min(1e-300)).item()  # type: ignore[no-any-return]


def nearest(rows: Tensor, table: Tensor) -> Tensor:
    """Return, for each of rows ``[n, d]``, the index of the row of table ``[m, d]`` with the largest cosine."""
    normalized = torch.nn.functional.normalize(table, dim=1)
    return torch.cat([(part @ normalized.mT).argmax(dim=1) for part in rows.split(1024)])  # type: ignore[no-untyped-call]


def centred(rows: Tensor) -> Tensor:
    """Return rows ``[n, d]`` without their mean row."""
    return rows - rows.mean(dim=0)


def polar(matrix: Tensor) -> Tensor:
    """Return the orthogonal matrix nearest to a square one, its polar factor; any such one where it is singular."""
    u, _, v = torch.linalg.svd(matrix)
    return u @ v  # type: ignore[no-any-return]


def matching(scores: Tensor) -> Tensor:
    """Return a column of its own for each row of scores ``[n, n]``: the best pair first, then the best of the rest."""
    scores = scores.clone()
    found = torch.full((len(scores),), -1, dtype=torch.long)
    while (left := (found < 0).nonzero().flatten()).numel():
        columns = scores[left].argmax(dim=1)
        # Each is the other's best: such pairs would be taken one after another.
        best = scores.argmax(dim=0)[columns] == left
        found[left[best]] = columns[best]
        scores[left[best]] = -torch.inf
        scores[:, columns[best]] = -torch.inf
    return found


def key_success(guess: Tensor, key: Tensor) -> float:
    """Return how near a guessed key is: 1 where equal, 0 where as far as a random one, ``|G - R| = sqrt(2) |R|``.

    The guess is brought to the key's size first: a smaller one would be nearer without being any better.
    """
    guess = guess * (key.norm() / guess.norm().clamp_min(1e-300))
    return max(0.0, 1.0 - relative_error(guess, key) / 2**0.5)
