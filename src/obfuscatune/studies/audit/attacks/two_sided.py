r"""A3, a public base against keys on both sides of a weight.

``W* = Q^T W P`` keeps W's singular values, and the nearest to W0 of all ``Q W* P^T`` is ``U0 S* V0^T``, with the base's
singular vectors: nothing but the values is recovered. Where P is no more than a permutation of neurons or an unknown
map of each head, the sides are solved in turns: neurons are matched (A16), then the other side is an orthogonal
Procrustes problem.

Source: R1 in docs/security.md.
"""

import torch
from torch import Tensor

from obfuscatune.studies.audit.algebra import procrustes
from obfuscatune.studies.audit.attack import Attack, Knowledge, NotApplicableError, Sample
from obfuscatune.studies.audit.attacks.multiset import find_order
from obfuscatune.studies.audit.attacks.weights import CHANCE, METRIC, Guess, each_weight, score_weights


def nearest_by_values(near: Tensor, weight: Tensor) -> Tensor:
    """``U0 S* V0^T``: the nearest to ``near`` of all two-sided rotations of a weight."""
    u, _, v = torch.linalg.svd(near, full_matrices=False)
    return (u * torch.linalg.svdvals(weight)) @ v  # type: ignore[no-any-return]


def _run(sample: Sample, knowledge: Knowledge) -> Guess:
    base, view = knowledge.base, sample.view
    if base is None:
        raise NotApplicableError("no base")

    def guess(block: int, role: str, weight: Tensor) -> Tensor:
        near = base.weight(block, role)
        if role in ("qkv", "out") or not permuted:
            return nearest_by_values(near, weight)
        order = find_order(view, base, block)
        if role == "up":
            ordered = order.first(weight)
            return procrustes(near.mT, ordered.mT).mT @ ordered
        ordered = order.last(weight)
        return ordered @ procrustes(near, ordered)

    permuted = view.segment(0, "up").whole
    return each_weight(view, guess)


ATTACK = Attack(
    id="A3",
    title="two-sided Procrustes",
    needs="B",
    source="R1 in docs/security.md",
    metric=METRIC,
    chance=f"{CHANCE}",
    run=_run,
    score=score_weights,
    fires_on="balanced",
    fires_at=0.6,
    by_tokens=False,
)
