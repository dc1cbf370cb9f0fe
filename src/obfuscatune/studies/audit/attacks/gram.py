r"""A9, Gram matching: an orthogonal key keeps the Gram matrix of the rows, and the tables' Gram tells the tokens.

    X* X*^T = X X^T

One row is the first anchor: for each token it could be, some other rows are asked whether any token has the inner
product seen. Only under the right one have all of them. The first anchor then names the rows that it decides best,
these are anchors for all others, and pairs of rows and entries of the table give the key (orthogonal Procrustes),
which reads the rest. Angles instead of inner products serve where norms are folded, too.

Source: A9 in docs/security.md; the key from pairs is Schönemann 1966.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from obfuscatune.studies.audit.algebra import procrustes
from obfuscatune.studies.audit.attack import Attack, Knowledge, NotApplicableError, Sample, top1
from obfuscatune.studies.audit.text import FIRST, look_up, positions, table, token_rows

_FIRSTS = 3  # rows that are tried as the first anchor
_WITNESSES = 8
_ANCHORS = 16
_ROUNDING = 1e-6  # of a cosine


def _run(sample: Sample, knowledge: Knowledge) -> Tensor:
    if knowledge.embeddings is None:
        raise NotApplicableError("no embedding tables")
    tables = normalize(table(knowledge, knowledge.embeddings.first_rows, "first rows"), dim=2)
    keyed, places = token_rows(sample.target, *FIRST), positions(sample.target, FIRST[1])
    rows = normalize(keyed, dim=1).float()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    _, first, token = min(_first_anchor(rows, places, tables, order.roll(i)) for i in range(_FIRSTS))
    tokens, misfit = _by_anchors(rows, places, tables, torch.tensor([first]), torch.tensor([token]))
    anchors = misfit.argsort()[:_ANCHORS]
    for _ in range(2):  # what a few anchors say, then what all together do
        tokens, misfit = _by_anchors(rows, places, tables, anchors, tokens[anchors])
        anchors = misfit.argsort()[: len(rows) // 2]
    key = procrustes(tables[places, tokens][anchors].double(), rows[anchors].double())
    return look_up(keyed @ key, places, tables)


def _first_anchor(rows: Tensor, places: Tensor, tables: Tensor, order: Tensor) -> tuple[float, int, int]:
    """Misfit, row and token of the best guess of one row."""
    first, witnesses = order[0], order[1 : 1 + _WITNESSES]
    misfit = torch.zeros(tables.shape[1])
    for witness in witnesses:
        could_be = tables[places[first]] @ tables[places[witness]].mT
        misfit += (could_be - rows[first] @ rows[witness]).abs().amin(dim=1).clamp_min(_ROUNDING).log()
    return misfit.min().item(), int(first), int(misfit.argmin())


def _by_anchors(rows: Tensor, places: Tensor, tables: Tensor, anchors: Tensor, named: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of all rows ``[n]`` by their angles with the anchors, and how badly they fit."""
    seen = rows @ rows[anchors].mT
    known = tables[places[anchors], named]
    tokens, misfit = torch.zeros(len(rows), dtype=torch.long), torch.zeros(len(rows))
    for place in places.unique():  # type: ignore[no-untyped-call]
        here = places == place
        distance = torch.cdist(seen[here], tables[place] @ known.mT, compute_mode="donot_use_mm_for_euclid_dist")
        misfit[here], tokens[here] = distance.min(dim=1)
    return tokens, misfit


ATTACK = Attack(
    id="A9",
    title="Gram matching",
    needs="E",
    source="A9 in docs/security.md",
    metric="share of the target's tokens",
    chance="the most frequent token's share",
    run=_run,
    score=lambda guess, truth: top1(guess, truth.target_tokens),
    fires_on="balanced",
    fires_at=0.9,
    by_tokens=False,
)
