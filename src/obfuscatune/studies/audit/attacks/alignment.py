r"""A13, unsupervised alignment: two clouds of points with the same shape are laid on each other.

Rows of the first block under the key are a cloud, rows made of the embedding tables are the same cloud, not turned,
each as heavy as its token is frequent in public text. min over R and over couplings P of ``|X R - P Y|``: in turns
Sinkhorn's coupling, sharper every round, and Procrustes, position by position where positions are
embedded. It starts from principal directions and means.

Source: Grave, Joulin and Berthet, Wasserstein-Procrustes, arXiv 1805.11222.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from obfuscatune.studies.audit.algebra import procrustes
from obfuscatune.studies.audit.attack import Attack, Knowledge, NotApplicableError, Sample, top1
from obfuscatune.studies.audit.attacks.covariance import Known, match_moments
from obfuscatune.studies.audit.text import FIRST, look_up, positions, table, token_rows

_SHARPNESS = [5.0 * 1.2**step for step in range(24)]
_SINKHORN = 3
_ROWS = 1024


def couple(scores: Tensor, prior: Tensor) -> Tensor:
    """Couple rows, alike heavy, with points of log weights ``[m]``, by log scores ``[..., n, m]``; rows sum to 1."""
    for _ in range(_SINKHORN):
        scores = scores - scores.logsumexp(dim=-2, keepdim=True) + prior
        scores = scores - scores.logsumexp(dim=-1, keepdim=True)
    return scores.exp()


def lay_on(rows: Tensor, known: Known, key: Tensor) -> Tensor:
    """Return R ``[d, d]`` that lays known points on rows ``[P, n, d]``, within each of P groups, from a first key."""
    points = normalize(known.tables, dim=2)
    for sharpness in _SHARPNESS:
        scores = sharpness * (normalize(rows @ key.mT, dim=2) @ points.mT)
        plan = couple(scores, known.prior)
        key = procrustes(rows.flatten(0, 1), (plan @ known.tables).flatten(0, 1))
    return key


def _run(sample: Sample, knowledge: Knowledge) -> Tensor:
    tables = knowledge.embeddings
    if tables is None:
        raise NotApplicableError("no embeddings")
    view, target = sample.view, sample.target
    everything, places = token_rows(view, *FIRST)[:_ROWS], positions(view, FIRST[1])[:_ROWS]
    embedded = knowledge.design.embedded_positions
    if not embedded:  # rows of all positions are one cloud
        places = torch.zeros_like(places)
    used = int(places.max()) + 1
    count = int(places.bincount().min())
    rows = torch.stack([everything[places == place][:count] for place in range(used)]).float()
    counts = knowledge.library.flatten().bincount(minlength=knowledge.vocabulary) + 0.1
    first_rows = table(knowledge, tables.first_rows, "first rows")
    known = Known(first_rows[:used], (counts / counts.sum()).log())
    corpus = knowledge.corpus[:, :used] if embedded else knowledge.corpus
    public = torch.cat([tables.first_rows(part, torch.arange(len(part))) for part in corpus]).float()
    key = lay_on(rows, known, match_moments(torch.cov(everything.float().mT), rows, known, public))
    return look_up(token_rows(target, *FIRST).float() @ key.mT, positions(target, FIRST[1]), first_rows)


ATTACK = Attack(
    id="A13",
    title="unsupervised alignment",
    needs="E",
    source="arXiv 1805.11222",
    metric="share of the target's tokens",
    chance="the most frequent token's share",
    run=_run,
    score=lambda guess, truth: top1(guess, truth.target_tokens),
    fires_on="balanced",
    fires_at=0.5,
    largest=4,
)
