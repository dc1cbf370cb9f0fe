r"""A4, the structure of Monarch keys: what it adds to a key that Procrustes found about (A1).

R = P0 B1 P1 B2 P2 with blocks of size b. Rows of R that share a block of B1 have their zeros at the same places, and
columns that share one of B2 too; so where there are zeros, groups of rows and of columns are found in an estimate.
Between two groups R has the rank with which the blocks are linked, about b^2 / d: all else there is noise. This attack
finds groups by their zeros. There need be none: A27 finds them by where the energy is, in an estimate that is mostly
noise.

Source: arXiv 2204.00595, whose projection on Monarch matrices this is, for unknown permutations.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from obfuscatune.studies.audit.algebra import polar, procrustes
from obfuscatune.studies.audit.attack import Attack, Knowledge, NotApplicableError, Sample, Score, Truth

_SMALL = (0.15, 0.25, 0.35)  # of the size of an entry where all are alike: below it is taken for zero; the best is kept
_SINGULAR = 0.35  # of the largest singular value between two groups
_WORSE = (
    1.3  # fit to the base, relative to that of the dense key, which fits noise too, up to which a structure is believed
)


@dataclass(frozen=True, slots=True, repr=False)
class Estimates:
    """A key ``[d, d]`` as Procrustes gives it, and with its structure."""

    dense: Tensor
    structured: Tensor


def groups(support: Tensor, size: int) -> list[Tensor]:
    """Split rows ``[n, m]`` in groups of ``size``: a row, and those whose zeros are most like its own."""
    normalized = torch.nn.functional.normalize(support, dim=1)
    alike = normalized @ normalized.mT
    free = torch.ones(len(support), dtype=torch.bool)
    found = []
    while free.any():
        row = int(free.nonzero()[0])
        found.append(alike[row].masked_fill(~free, -1.0).topk(min(size, int(free.sum()))).indices)
        free[found[-1]] = False
    return found


def project(key: Tensor, size: int, small: float) -> Tensor:
    """The orthogonal matrix with low-rank parts that is near an estimate of a key ``[d, d]``."""
    support = (key.abs() > small * len(key) ** -0.5).double()
    found = torch.zeros_like(key)
    for rows in groups(support, size):
        for columns in groups(support.mT, size):
            u, s, v = torch.linalg.svd(key[rows][:, columns], full_matrices=False)
            kept = (s > _SINGULAR * s[0]) & (s > small * size * len(key) ** -0.5)
            found[rows[:, None], columns] = (u * (s * kept)) @ v
    return polar(found)


def _run(sample: Sample, knowledge: Knowledge) -> list[Estimates]:
    base, profile = knowledge.base, knowledge.profile
    if base is None:
        raise NotApplicableError("no base")
    if profile.keys != "monarch" or profile.key_block >= base.width:
        raise NotApplicableError("the key is one dense block")
    return [
        _estimate(base.weight(block, "qkv"), sample.view.weight(block, "qkv"), profile.key_block)
        for block in range(sample.view.blocks)
    ]


def _estimate(near: Tensor, weight: Tensor, size: int) -> Estimates:
    """Of the structured keys, the one that fits the base best; the dense one where none fits about as well."""

    def fit(key: Tensor) -> float:
        return (near - key @ weight).norm().item()  # type: ignore[no-any-return]

    dense = procrustes(near.mT, weight.mT).mT
    structured = min((project(dense, size, small) for small in _SMALL), key=fit)
    return Estimates(dense, structured if fit(structured) < _WORSE * fit(dense) else dense)


def _score(guess: list[Estimates], truth: Truth) -> Score:
    """1 - |S - R| / |D - R|."""
    keys = [truth.keys[block, "attention in"] for block in range(len(guess))]
    left = [(g.structured - r).norm() / (g.dense - r).norm() for g, r in zip(guess, keys, strict=True)]
    return Score(max(0.0, 1 - torch.stack(left).mean().item()), 0.0)


ATTACK = Attack(
    id="A4",
    title="structure of Monarch keys",
    needs="B",
    source="arXiv 2204.00595",
    metric="share of the error of A1's key before q, k, v that the structure takes away",
    chance="0: nothing",
    run=_run,
    score=_score,
    fires_on="paper+keys=monarch+key_block=8",
    fires_at=0.2,
    by_tokens=False,
)
