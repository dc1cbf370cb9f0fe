r"""A20, what an adapter was trained on: texts of one session are recognized in another under keys of its own.

The operator serves a model and has fine-tuned it. An orthogonal key keeps the Gram of a text's rows in the first block,
which depend on tokens and positions alone, so a text that was served and is one of the training's shows by

    X1* X1*^T = X2* X2*^T

Where keys are not orthogonal but on one side of the weights, R1^-1 R2 = W1* W2*^+ (R3) brings one session's rows to
the other's, and rows are compared themselves. Membership in the usual sense, from the loss of an exported adapter,
needs the adapter in the clear, and is not what the worker has.

The rank is no secret: shapes of factors and of low-rank numbers show it, and the spectrum of rows of ``u`` does where
they are padded. It is the value.

Source: A20 in docs/security.md; size from spectra after Salama et al., arXiv 2406.19395.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from obfuscatune.studies.audit.attack import (
    Attack,
    Knowledge,
    NotApplicableError,
    Sample,
    Score,
    Truth,
    area_under_curve,
)
from obfuscatune.studies.audit.text import FIRST, FIRST_WEIGHT, length_of, token_rows
from obfuscatune.studies.audit.view import WorkerView

_ONE_SIDED = 1e-2  # relative error up to which one relative key explains both sessions' weights
_RANK = 1e-4  # of the largest singular value


@dataclass(frozen=True, slots=True, repr=False)
class Membership:
    """How near each served text, of view and target, is to one of the training's; the adapter's rank, 0 if not seen."""

    view: Tensor
    target: Tensor
    length: int
    rank: int


def adapter_rank(view: WorkerView) -> int:
    """The rank of what crosses of an adapter, 0 where nothing does."""
    for a, _ in view.held.values():
        return _rank(a)
    for calls in view.passes[2:]:  # factors of the first step are zero on one side
        for call in calls:
            factors = [t for name, t in call.inputs.items() if name.partition(".")[0] in ("u", "A")]
            if factors:
                return _rank(factors[0])
    return 0


def _rank(factor: Tensor) -> int:
    sizes = torch.linalg.svdvals(factor.double().flatten(0, -2))
    return int((sizes > _RANK * sizes[0]).sum())


def _texts(view: WorkerView, length: int, start: int = 0) -> Tensor:
    """Rows from ``start`` on of every text ``[texts, length, d]``."""
    found = []
    for number, calls in enumerate(view.passes):
        if calls[0].backward:
            continue
        one = view.only(slice(number, number + 1))
        rows = token_rows(one, *FIRST)
        found.append(rows.view(-1, length_of(one), rows.shape[1])[:, start : start + length])
    return torch.cat(found)


def _alike(served: Tensor, trained: Tensor) -> Tensor:
    """The largest cosine ``[n]`` of things ``[n, ...]`` with any of others ``[m, ...]``, less the mean of these."""
    common = trained.mean(dim=0)
    a, b = (normalize((part - common).flatten(1), dim=1) for part in (served, trained))
    return (a @ b.mT).amax(dim=1)


def _gram(texts: Tensor) -> Tensor:
    """Inner products of different rows of each text ``[n, T * T]``, of norm 1; a norm tells how many rows are mixed."""
    return normalize(((texts @ texts.mT) * (1 - torch.eye(texts.shape[1], dtype=texts.dtype))).flatten(1), dim=1)


def _run(sample: Sample, knowledge: Knowledge, start: int = 0) -> Membership:
    length = knowledge.corpus.shape[1] // 2
    served, target = (_texts(view, length) for view in (sample.view, sample.target))
    trained = _texts(sample.training, length, start)
    if not len(served) or not len(trained):
        raise NotApplicableError("the first block's input does not cross")
    here, there = sample.view.weight(*FIRST_WEIGHT), sample.training.weight(*FIRST_WEIGHT)
    relative = here @ torch.linalg.pinv(there)
    if (relative @ there - here).norm() < _ONE_SIDED * here.norm():
        features = [served @ relative, target @ relative, trained]
    else:
        features = [_gram(texts) for texts in (served, target, trained)]
    served, target, trained = features
    return Membership(_alike(served, trained), _alike(target, trained), length, adapter_rank(sample.training))


def _score(guess: Membership, truth: Truth) -> Score:
    """Texts that a training text begins with, against those that are in none."""
    length = guess.length
    trained = torch.cat([batch.unfold(1, length, 1).flatten(0, 1) for batch in truth.training.batches])
    begins = torch.cat([batch[:, :length] for batch in truth.training.batches])
    members, others = [], []
    target = truth.target_tokens.view(truth.target_shape)[:, :length]
    for near, texts in ((guess.view, truth.tokens.view(-1, length)), (guess.target, target)):
        count = min(len(near), len(texts))
        at_start = (texts[:count, None] == begins).all(dim=2).any(dim=1)
        anywhere = (texts[:count, None] == trained).all(dim=2).any(dim=1)
        members.append(near[:count][at_start])
        others.append(near[:count][~anywhere])
    found = area_under_curve(torch.cat(members), torch.cat(others))
    return Score(found.success, found.chance, float(guess.rank))


def _sham(sample: Sample, knowledge: Knowledge) -> Membership:
    """Against the second halves of the texts: other text of the same kind, at other positions."""
    return _run(sample, knowledge, start=knowledge.corpus.shape[1] // 2)


ATTACK = Attack(
    id="A20",
    title="adapter inference",
    needs="N",
    source="A20 in docs/security.md; arXiv 2406.19395",
    metric="2 AUC - 1 of telling served texts that were trained on from others; value: the adapter's rank as seen",
    chance="0: AUC 0.5",
    run=_run,
    score=_score,
    fires_on="balanced",
    fires_at=0.95,
    by_tokens=False,
    sham=_sham,
)
