r"""A18, labels: gradients at the last block's output are zero where no label is, and alike where labels are.

With p the predicted distribution, y_t the label, W the head and J_t the last norm's Jacobian, the worker gets

    dY_t = (p_t - 1[y_t]) W^T J_t R

in which no other token has part. So rows of norm zero are those that the loss leaves out: the prompts, and what is
after the end. Of the others, two with one label share the direction of that label's embedding; the cosine tells such
pairs. Both need no key, and an invertible key changes neither zeros nor, where it is orthogonal, cosines.

Where rows are mixed, they are taken for the tokens that they would be.

Source: Li et al., arXiv 2102.08504 (norms and cosines); Kariyappa and Qureshi, arXiv 2203.05222.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from obfuscatune.studies.audit.attack import (
    Attack,
    Knowledge,
    NotApplicableError,
    Sample,
    Score,
    TrainingTruth,
    Truth,
    area_under_curve,
)

STREAM = "gradient of mlp out"


def _run(sample: Sample, knowledge: Knowledge) -> list[Tensor]:
    """Gradients at the last block's output, one ``[n, d]`` a step; what is read off them is norms and cosines."""
    view = sample.training
    steps = [view.only(slice(i, i + 1)).rows(view.blocks - 1, STREAM) for i in range(len(view.passes))]
    found = [rows for rows in steps if len(rows)]
    if not found:
        raise NotApplicableError("no gradient crosses")
    return found


def mask_score(gradients: list[Tensor], truth: TrainingTruth) -> Score:
    """How well norms tell tokens in the loss from others at the same position, which alone tells much."""
    pairs = list(zip(gradients, truth.scored, strict=False))
    # Relative to the step's median of what is not zero: the size of gradients falls as the loss does.
    sizes = [rows.norm(dim=1)[: mask.numel()].view(mask.shape) for rows, mask in pairs]
    norms = torch.cat([size / size[size > 0].median().clamp_min(1e-300) for size in sizes])
    scored = torch.cat([mask for _, mask in pairs])
    total, weights = 0.0, 0
    for place in range(scored.shape[1]):
        inside, outside = norms[scored[:, place], place], norms[~scored[:, place], place]
        weight = len(inside) * len(outside)
        if weight:
            total += weight * area_under_curve(inside, outside).success
            weights += weight
    if not weights:
        raise NotApplicableError("every position is in the loss in all texts or in none")
    return Score(total / weights, 0.0)


def pair_score(gradients: list[Tensor], truth: TrainingTruth) -> float:
    """AUC of the cosine for pairs of rows of a step that have one label, against pairs that have two."""
    same, other = [], []
    for rows, mask, batch in zip(gradients, truth.scored, truth.batches, strict=False):
        length = min(len(rows), mask.numel())
        inside = mask.flatten()[:length]
        labels = batch.roll(-1, dims=1).flatten()[:length][inside]
        directions = normalize(rows[:length][inside], dim=1)
        above = torch.ones(len(labels), len(labels)).triu(1).bool()
        equal = labels[:, None] == labels
        cosines = directions @ directions.mT
        same.append(cosines[above & equal])
        other.append(cosines[above & ~equal])
    return area_under_curve(torch.cat(same), torch.cat(other)).value or 0.0


def _score(guess: list[Tensor], truth: Truth) -> Score:
    found = mask_score(guess, truth.training)
    return Score(found.success, found.chance, pair_score(guess, truth.training))


ATTACK = Attack(
    id="A18",
    title="labels from gradients",
    needs="N",
    source="arXiv 2102.08504, arXiv 2203.05222",
    metric="2 AUC - 1 of telling tokens in the loss from others at their position; value: AUC of pairs with one label",
    chance="0: AUC 0.5",
    run=_run,
    score=_score,
    fires_on="balanced",
    fires_at=0.95,
    by_tokens=False,
)
