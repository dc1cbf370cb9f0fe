r"""A19 and A23, span checks: a row that went into a call lies in the span of what the call shows, others do not.

A candidate row x, in the key's coordinates, is tested by its leverage in rows M ``[m, d]``, per unit of its norm:

    h(x) = x^T (M^T M + e)^-1 x / |x|^2,   e = 1e-9 of the largest eigenvalue

Outside the span h is of the order 1/e. Within a span that is the whole space, rows that M was made of still have less
of it, as no row has more leverage than 1 in what it belongs to. So the check goes on where d rows have been passed.

*A23* takes the rows of a call themselves, A X R where they are mixed. *A19* takes D = X^T dY of the last MLP's input
and the gradient at its output, text by text where shapes show texts: its columns span the rows of tokens that are in
the loss, as those of a weight's gradient do, which is what the check was made for.

Candidates are handed in by the score, under the true key: an attacker who has that is more than any of the profiles
claims to stand, and mixing alone is then between him and the answer. In the score others are as near as can be: rows
of the same stream and session from other texts.

Source: Petrov et al., arXiv 2405.15586 (A19); A23 in docs/security.md.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from obfuscatune.enclave.mixing import tile_starts
from obfuscatune.studies.audit.attack import (
    Attack,
    Knowledge,
    NotApplicableError,
    Sample,
    Score,
    Truth,
    area_under_curve,
)
from obfuscatune.studies.audit.text import tokens_of_calls
from obfuscatune.studies.audit.view import STREAMS_OF, WorkerView

Place = tuple[int, str]
_RIDGE = 1e-9
_PASSES = 4  # of those with the fewest rows for their width
_CANDIDATES = 512
_INTO = {into: role for role, (into, _) in STREAMS_OF.items()}


@dataclass(frozen=True, slots=True, repr=False)
class Check:
    """Inverse second moments ``[width, width]``; blocks of tiles where each tile is mixed on its own."""

    inverse: Tensor

    @classmethod
    def of(cls, rows: list[Tensor]) -> "Check":
        """A check against rows, given as one or more tiles side by side ``[m, w]``."""
        width = sum(part.shape[1] for part in rows)
        inverse, start = rows[0].new_zeros(width, width), 0
        for part in rows:
            end = start + part.shape[1]
            inverse[start:end, start:end] = _inverse(part)
            start = end
        return cls(inverse)

    def leverage(self, candidates: Tensor) -> Tensor:
        """Leverage per unit of squared norm ``[n]``, for rows ``[n, width]``."""
        squares = candidates.square().sum(dim=1).clamp_min(1e-300)
        return ((candidates @ self.inverse) * candidates).sum(dim=1) / squares


def _inverse(rows: Tensor) -> Tensor:
    sizes, axes = torch.linalg.eigh(rows.mT @ rows)
    inverse: Tensor = axes / (sizes.clamp_min(0) + _RIDGE * sizes[-1].clamp_min(1e-300)) @ axes.mT
    return inverse


@dataclass(frozen=True, slots=True, repr=False)
class RowSpans:
    """A23: checks by stream and number of the pass, and the view, whose passes they are of."""

    checks: dict[tuple[Place, int], Check]
    view: WorkerView


def _tiles(view: WorkerView, place: Place) -> list[Tensor]:
    """Rows of a view of one pass, cut as they were mixed."""
    rows = view.rows(*place)
    if not view.mixed or not len(rows):
        return [rows]
    call = next(view.calls(place[0], _INTO[place[1]]))
    tile = call.inputs["x"].shape[2]
    starts = tile_starts(rows.shape[1], tile)
    ends = [*starts[1:], rows.shape[1]]
    return [rows[:, start:end] for start, end in zip(starts, ends, strict=True)]


def _run_rows(sample: Sample, knowledge: Knowledge) -> RowSpans:
    view = sample.view
    wide: dict[tuple[Place, int], tuple[float, list[Tensor]]] = {}
    for number in range(len(view.passes)):
        one = view.only(slice(number, number + 1))
        for place in ((block, stream) for block in range(view.blocks) for stream in _INTO):
            tiles = _tiles(one, place)
            if len(tiles[0]):
                wide[place, number] = (len(tiles[0]) / tiles[0].shape[1], tiles)
    if not wide:
        raise NotApplicableError("no rows cross")
    checks: dict[tuple[Place, int], Check] = {}
    for place in {place for place, _ in wide}:
        numbers = sorted((number for where, number in wide if where == place), key=lambda n: (wide[place, n][0], n))
        checks |= {(place, number): Check.of(wide[place, number][1]) for number in numbers[:_PASSES]}
    return RowSpans(checks, view)


def _score_rows(guess: RowSpans, truth: Truth) -> Score:
    """Mean over streams: each by its first check, the one with the fewest rows for its width; mixed, by all."""
    counts = torch.tensor([0, *tokens_of_calls(guess.view)]).cumsum(dim=0).tolist()
    found: dict[Place, list[float]] = {}
    for (place, number), check in guess.checks.items():
        if place not in truth.keys:
            continue
        inside = slice(counts[number], counts[number + 1])
        others = torch.cat([truth.streams[place][: inside.start], truth.streams[place][inside.stop :]])
        others = torch.cat([others, truth.target_streams[place]])
        keyed = [rows @ truth.keys[place] for rows in (truth.streams[place][inside], others)]
        members, strangers = (rows[:: max(1, len(rows) // _CANDIDATES)] for rows in keyed)
        if len(members):
            score = area_under_curve(-check.leverage(members), -check.leverage(strangers))
            found.setdefault(place, []).append(score.success)
    if not found:
        raise NotApplicableError("no stream has a key of its own")
    best = [value for values in found.values() for value in (values if guess.view.mixed else values[:1])]
    return Score(sum(best) / len(best), 0.0)


def _run_gradient(sample: Sample, knowledge: Knowledge) -> list[list[Check]]:
    """Checks of each step's texts, or one for the step where texts are not told apart."""
    view = sample.training
    place = (view.blocks - 1, "mlp in")
    found = []
    inputs: Tensor | None = None
    for number in range(len(view.passes)):
        one = view.only(slice(number, number + 1))
        if not view.passes[number][0].backward:
            inputs = one.rows(*place)
            texts = 1 if view.mixed else view.passes[number][0].inputs["x"].shape[0]
            continue
        gradients = one.rows(place[0], "gradient of mlp out")
        if inputs is None or not len(gradients):
            continue
        length = min(len(inputs), len(gradients)) // texts
        pieces = [slice(text * length, (text + 1) * length) for text in range(texts)]
        found.append([Check.of([gradients[piece].mT @ inputs[piece]]) for piece in pieces])
    if not found:
        raise NotApplicableError("no gradient crosses")
    return found


def _score_gradient(guess: list[list[Check]], truth: Truth) -> Score:
    """On the first step, before the adapter changes anything: a text's rows in the loss against those of others."""
    training = truth.training
    place = (truth.private.blocks - 1, "mlp in")
    if place not in training.keys:
        raise NotApplicableError("the stream has no key of its own")
    batch, scored = training.batches[0], training.scored[0]
    rows = truth.private.streams([batch], [place[1]])[place] @ training.keys[place]
    rows = rows.view(*batch.shape, -1)
    found = []
    for text in range(len(batch)):
        check = guess[0][text if len(guess[0]) == len(batch) else 0]
        others = torch.arange(len(batch)) != text
        # Where texts are not told apart, tokens in the loss against tokens that are not.
        inside = rows[text][scored[text]]
        outside = rows[others][scored[others]] if len(guess[0]) == len(batch) else rows[text][~scored[text]]
        found.append(area_under_curve(-check.leverage(inside), -check.leverage(outside)).success)
    return Score(sum(found) / len(found), 0.0)


ATTACKS = (
    Attack(
        id="A19",
        title="gradient span check",
        needs="N",
        source="arXiv 2405.15586",
        metric="2 AUC - 1 of telling rows that a text's gradient was made of from rows of other texts",
        chance="0: AUC 0.5",
        run=_run_gradient,
        score=_score_gradient,
        fires_on="balanced",
        fires_at=0.9,
        by_tokens=False,
    ),
    Attack(
        id="A23",
        title="span check on rows",
        needs="N",
        source="A23 in docs/security.md",
        metric="2 AUC - 1 of telling rows that were in a call from others, over streams",
        chance="0: AUC 0.5",
        run=_run_rows,
        score=_score_rows,
        fires_on="balanced",
        fires_at=0.8,
    ),
)
