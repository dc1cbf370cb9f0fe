r"""A6, lineage: which public model was this one made from?

An orthogonal key on either side keeps a weight's singular values. The distance of two weights' values, each list scaled
to norm 1, is small for a weight and what it was fine-tuned from. A family of candidates is at hand in the base
itself: its other blocks. Where head keys change the values of q, k, v and of the output, those of the MLP remain.

Source: arXiv 2510.06738, arXiv 2512.03620.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from obfuscatune.audit.attack import Attack, Knowledge, NotApplicableError, Sample, Score, Truth, area_under_curve
from obfuscatune.audit.view import WorkerView

_ROLES = ("up", "down")


def distances(view: WorkerView, near: Callable[[int, str], Tensor]) -> Tensor:
    """Distances ``[roles, blocks, blocks]`` of the worker's weights from the candidates' of the same role."""
    blocks = range(view.blocks)
    found = []
    for role in _ROLES:
        here, there = ([_values(weight(i, role)) for i in blocks] for weight in (view.weight, near))
        found.append(torch.cdist(torch.stack(here), torch.stack(there)))
    return torch.stack(found)


def _values(weight: Tensor) -> Tensor:
    values = torch.linalg.svdvals(weight)
    return values / values.norm()  # type: ignore[no-any-return]


def _run(sample: Sample, knowledge: Knowledge) -> Tensor:
    if knowledge.base is None:
        raise NotApplicableError("no base")
    return distances(sample.view, knowledge.base.weight)


def _random_base(sample: Sample, knowledge: Knowledge) -> Tensor:
    """An unrelated model is no control: weights of one depth are alike in all models."""
    generator = torch.Generator().manual_seed(0)

    def drawn(block: int, role: str) -> Tensor:
        return torch.randn(sample.view.weight(block, role).shape, generator=generator, dtype=torch.float64)

    return distances(sample.view, drawn)


def _score(guess: Tensor, truth: Truth) -> Score:
    same = torch.eye(guess.shape[1], dtype=torch.bool).expand_as(guess)
    return area_under_curve(-guess[same], -guess[~same])


ATTACK = Attack(
    id="A6",
    title="lineage",
    needs="B",
    source="arXiv 2510.06738, arXiv 2512.03620",
    metric="2 AUC - 1 of its own base's weights among others",
    chance="0",
    run=_run,
    score=_score,
    fires_on="balanced",
    fires_at=0.8,
    by_tokens=False,
    sham=_random_base,
)
