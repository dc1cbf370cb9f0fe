r"""A6, lineage: was this model made from that public one?

An orthogonal key on either side keeps a weight's singular values. Their size and their decay say how long a model was
trained, and how deep in it the weight is: two models of one kind agree in that, related or not. What is left of their
logarithms when a moving average is taken away, in units of the mean distance between neighbours there, is a weight's
own, and fine-tuning keeps it. Where head keys change the values of q, k, v and of the output, the MLP's remain; of a
gated MLP under an order and secret sizes of its neurons, those of the gate.

Source: arXiv 2510.06738, arXiv 2512.03620; without their trend, A6 in docs/security.md.
"""

import torch
from torch import Tensor

from obfuscatune.studies.audit.attack import Attack, Knowledge, NotApplicableError, Sample, Score, Truth

_ROLES = ("up", "down")
_WINDOW = 11  # values of a moving average; odd
_ENDS = 8  # one of so many values is left out at either end, where a trend is steep


def fluctuations(weight: Tensor) -> Tensor:
    """What is a weight's own in its singular values, of mean 0 and norm 1."""
    values = torch.linalg.svdvals(weight)
    ends = len(values) // _ENDS
    windows = values[ends:-ends].log().unfold(0, _WINDOW, 1)
    spacing = (windows[:, 0] - windows[:, -1]) / (_WINDOW - 1)
    found = (windows[:, _WINDOW // 2] - windows.mean(dim=1)) / spacing
    return torch.nn.functional.normalize(found - found.mean(), dim=0)


def _run(sample: Sample, knowledge: Knowledge) -> Tensor:
    """Return the correlation of each weight's fluctuations with the candidate's ``[blocks * weights]``."""
    base, view = knowledge.base, sample.view
    if base is None:
        raise NotApplicableError("no base")
    found = []
    for block in range(view.blocks):
        scaled = knowledge.design.gated and view.segment(block, "up").whole
        for role in _ROLES if not scaled else _ROLES[:1]:
            halves = 2 if knowledge.design.gated and role == "up" else 1
            pairs = zip(
                view.weight(block, role).chunk(halves, 1), base.weight(block, role).chunk(halves, 1), strict=True
            )
            correlations = [fluctuations(here) @ fluctuations(there) for here, there in pairs]
            found += correlations[:1] if scaled else correlations
    return torch.stack(found)


def _score(guess: Tensor, truth: Truth) -> Score:
    return Score(guess.mean().item(), 0.1)


ATTACK = Attack(
    id="A6",
    title="lineage",
    needs="B",
    source="arXiv 2510.06738, arXiv 2512.03620",
    metric="correlation of singular values with the base's, trend removed, over the MLPs' weights",
    chance="0.1: of few values, as many as a small model has",
    run=_run,
    score=_score,
    fires_on="balanced",
    fires_at=0.3,
    by_tokens=False,
)
