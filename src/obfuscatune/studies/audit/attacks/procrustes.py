r"""A1 and A2, a public base against a key on one side of a weight: Procrustes, and least squares.

With ``W* = R^-1 W`` and W near a public W0, an orthogonal R is about the Q that minimizes ``|W0 - Q W*|``, and any R
about ``W0 pinv(W*)``. Then ``W^ = Q W*``. A key behind the weight is found likewise. What is left of W - W0 is the
key's degrees of freedom over the weight's: 1/6 for q,k,v under an orthogonal key, 1/3 under any other; 1/2, and all
of it, for d x d.

Source: Schönemann 1966; R1 in docs/security.md.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from obfuscatune.studies.audit.algebra import procrustes
from obfuscatune.studies.audit.attack import Attack, Knowledge, NotApplicableError, Sample
from obfuscatune.studies.audit.attacks.weights import CHANCE, METRIC, Guess, each_weight, score_weights

# Side on which a key is in front: the worker's input is keyed there; behind the others.
_IN_FRONT = ("qkv", "up")


def _with(solve: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Sample, Knowledge], Guess]:
    """solve: ``(W0, W*) -> W^`` for a key in front."""

    def run(sample: Sample, knowledge: Knowledge) -> Guess:
        base = knowledge.base
        if base is None:
            raise NotApplicableError("no base")

        def guess(block: int, role: str, weight: Tensor) -> Tensor:
            near = base.weight(block, role)
            return solve(near, weight) if role in _IN_FRONT else solve(near.mT, weight.mT).mT

        return each_weight(sample.view, guess)

    return run


def by_rotation(near: Tensor, weight: Tensor) -> Tensor:
    """``Q W*`` with the orthogonal Q that brings it nearest to ``near``."""
    return procrustes(near.mT, weight.mT).mT @ weight


def by_any_map(near: Tensor, weight: Tensor) -> Tensor:
    """``G W*`` with any G."""
    return near @ torch.linalg.pinv(weight) @ weight  # type: ignore[no-any-return]


ATTACKS = (
    Attack(
        id="A1",
        title="Procrustes on weights",
        needs="B",
        source="Schönemann 1966; R1 in docs/security.md",
        metric=METRIC,
        chance=f"{CHANCE}",
        run=_with(by_rotation),
        score=score_weights,
        fires_on="paper",
        fires_at=0.6,
        by_tokens=False,
    ),
    Attack(
        id="A2",
        title="least squares on weights",
        needs="B",
        source="R1 in docs/security.md",
        metric=METRIC,
        chance=f"{CHANCE}",
        run=_with(by_any_map),
        score=score_weights,
        fires_on="naive",
        fires_at=0.3,
        by_tokens=False,
    ),
)
