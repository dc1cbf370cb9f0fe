r"""A21, equality and frequency: a static key makes equal rows of equal tokens, and frequent rows of frequent tokens.

The first block's row depends on the token alone where positions are not embedded, and else on token and position.
Without the mean row of its position, what is left is
mostly the token's embedding, so that the cosine tells equal tokens at different positions too:

    c_ij = cos(x_i - mean of position(i), x_j - mean of position(j))

Rows with a large cosine are one cluster. The largest cluster is guessed to be the most frequent token of public text,
and so on: the oldest attack on a substitution cipher. Where rows are mixed, they are taken for the tokens they would
be.

Source: R5 in docs/security.md; frequency analysis of deterministic encryption: Naveed, Kamara and Wright 2015.
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
    top1,
)
from obfuscatune.studies.audit.text import FIRST, positions, token_rows

_EQUAL = 0.8  # cosine from which two rows are one token
_ROWS = 3072  # of the view that help; more only sharpen the means


@dataclass(frozen=True, slots=True, repr=False)
class Clusters:
    """Directions of the target's rows ``[n, d]``, and the token ``[n]`` that frequency makes of each."""

    directions: Tensor
    tokens: Tensor


def without_position(rows: Tensor, places: Tensor) -> Tensor:
    """Return unit rows ``[n, d]`` less the mean row of their position; with few rows, less a share of it.

    The mean of k rows holds 1/k of each of them; the mean of all rows stands for one more.
    """
    count = int(places.max()) + 1
    sums = rows.new_zeros(count, rows.shape[1]).index_add_(0, places, rows) + rows.mean(dim=0)
    return normalize(rows - (sums / (places.bincount(minlength=count) + 1)[:, None])[places], dim=1)


def cluster(directions: Tensor) -> Tensor:
    """Return the cluster ``[n]`` of each direction: rows join the first one before them that is near."""
    near = directions @ directions.mT >= _EQUAL
    first = near.long().argmax(dim=1)
    while not torch.equal(first, first[first]):
        first = first[first]
    return first


def _run(sample: Sample, knowledge: Knowledge) -> Clusters:
    target = token_rows(sample.target, *FIRST)
    if not len(target):
        raise NotApplicableError("the first block's input does not cross")
    rows = torch.cat([target, token_rows(sample.view, *FIRST)[:_ROWS]])
    places = torch.cat([positions(view, FIRST[1]) for view in (sample.target, sample.view)])[: len(rows)]
    if not knowledge.design.embedded_positions:  # equal tokens have equal rows
        places = torch.zeros_like(places)
    directions = without_position(rows, places)
    found = cluster(directions)
    public = torch.cat([knowledge.corpus.flatten(), knowledge.library.flatten()]).bincount(
        minlength=knowledge.vocabulary
    )
    ranked, sizes = public.argsort(descending=True), found.bincount(minlength=len(found))
    rank = torch.empty_like(sizes)
    rank[sizes.argsort(descending=True)] = torch.arange(len(sizes))
    return Clusters(directions[: len(target)], ranked[rank[found[: len(target)]].clamp_max(len(ranked) - 1)])


def _score(guess: Clusters, truth: Truth) -> Score:
    """The chance is measured: the same rows with other texts' tokens at their positions."""
    tokens = truth.target_tokens
    rows = guess.directions[: len(tokens)]
    above = torch.ones(len(rows), len(rows)).triu(1).bool()
    cosines = (rows @ rows.mT)[above]

    def separated(labels: Tensor) -> float:
        equal = (labels[:, None] == labels)[above]
        return area_under_curve(cosines[equal], cosines[~equal]).success

    texts, length = truth.target_shape
    others = [separated(tokens.roll(shift * length)[: len(rows)]) for shift in range(1, texts)]
    found = separated(tokens[: len(rows)])
    return Score(found, sum(others) / max(1, len(others)), top1(guess.tokens, tokens).success)


ATTACK = Attack(
    id="A21",
    title="equality and frequency",
    needs="N",
    source="R5 in docs/security.md; Naveed, Kamara and Wright 2015",
    metric="2 AUC - 1 of telling pairs of equal tokens; value: share of tokens that frequency gives",
    chance="the same with other texts' tokens; about 0",
    run=_run,
    score=_score,
    fires_on="balanced",
    fires_at=0.8,
)
