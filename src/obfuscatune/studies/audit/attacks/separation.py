r"""A14, blind source separation: neurons are sparse, so of all bases of their keyed rows theirs is the least Gaussian.

Rows X* = X K are whitened, and a rotation W of the whitened rows Z is turned towards signals Z W that are far from
Gaussian (FastICA, all signals at once):

    W <- polar(Z^T g(Z W) / n - W diag(mean g'(Z W))),   g = tanh

Signals of independent neurons come out as themselves. Those of a trained model depend on each other, and come out in
part. Where a secret order alone hides neurons, there is nothing to separate: signals are the worker's own.

Where rows are mixed by A, those of all calls with tiles of one width are pooled and taken for what they would be
unmixed; A is drawn anew for each. From the left, of A itself, there is nothing to learn from one call: whitened, its
w columns are w samples of w sources, and any basis fits them.

Source: Hyvärinen, "Fast and robust fixed-point algorithms for independent component analysis", 1999; R7 in
docs/security.md, on independent neurons.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from obfuscatune.enclave.mixing import tile_starts
from obfuscatune.studies.audit.algebra import centred, polar
from obfuscatune.studies.audit.attack import Attack, Knowledge, NotApplicableError, Sample, Score, Truth
from obfuscatune.studies.audit.text import tokens_of_calls
from obfuscatune.studies.audit.view import WorkerView

PLACE = (0, "activations")
_ROWS = 3072  # more change the second decimal, and cost seconds
_STEPS = 40
_RANK = 1e-6  # of the largest standard deviation, below which a direction is rounding
_SEPARATED = 0.9  # correlation from which a neuron counts as separated


@dataclass(frozen=True, slots=True, repr=False)
class Signals:
    """Columns of a stream from ``start`` on, whitened by ``[w, k]``, then turned by ``[k, k]``."""

    start: int
    whitener: Tensor
    turn: Tensor

    def of(self, rows: Tensor, turn: Tensor | None = None) -> Tensor:
        """Signals ``[n, k]`` of keyed rows ``[n, width]``; those of another turn, where given."""
        part = rows[:, self.start : self.start + len(self.whitener)]
        signals: Tensor = part @ self.whitener @ (self.turn if turn is None else turn)
        return signals


@dataclass(frozen=True, slots=True, repr=False)
class Separated:
    """What was learnt, and the target's rows ``[n, width]``, none where they are mixed."""

    parts: list[Signals]
    target: Tensor | None


def drawn_turn(size: int, seed: int) -> Tensor:
    """Return an orthogonal matrix ``[size, size]``."""
    draw = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    turn: Tensor = torch.linalg.qr(draw).Q
    return turn


def whiten(rows: Tensor) -> Tensor:
    """Return ``[w, k]`` that brings rows ``[n, w]`` to unit covariance, k their rank."""
    sizes, axes = torch.linalg.eigh(torch.cov(rows.T))
    kept = sizes.clamp_min(0).sqrt() > _RANK * sizes[-1].clamp_min(1e-300).sqrt()
    kept &= torch.arange(len(sizes)) >= len(sizes) - (len(rows) - 1)
    whitener: Tensor = axes[:, kept] / sizes[kept].sqrt()
    return whitener


def separate(white: Tensor, seed: int = 0) -> Tensor:
    """FastICA: return the rotation ``[k, k]`` of whitened, centred rows ``[n, k]``."""
    z = white.float()
    turn = drawn_turn(z.shape[1], seed).float()
    for _ in range(_STEPS):
        bent = torch.tanh(z @ turn)
        after = polar(z.mT @ bent / len(z) - turn * (1 - bent.square()).mean(dim=0))
        moved = 1 - (after * turn).sum(dim=0).abs().min()
        turn = after
        if moved < 1e-4:
            break
    return turn.double()


def _pools(view: WorkerView) -> dict[int, list[Tensor]]:
    """Tiles ``[tiles, m, w]`` of each call by their width; of rows that are not mixed, one tile."""
    if not view.mixed:
        rows = view.rows(*PLACE)
        return {rows.shape[1]: [rows[None]]} if len(rows) else {}
    pools: dict[int, list[Tensor]] = {}
    for call, tokens in zip(view.calls(PLACE[0], "down"), tokens_of_calls(view), strict=True):
        tiles = call.inputs["x"][:, :tokens].double()
        pools.setdefault(tiles.shape[2], []).append(tiles)
    return pools


def _run(sample: Sample, knowledge: Knowledge) -> Separated:
    target = sample.target.rows(*PLACE)
    if not len(target):
        raise NotApplicableError("the MLP's activations do not cross")
    if knowledge.profile.mlp == "worker":  # under an order alone, or as they are
        eye = torch.eye(target.shape[1], dtype=target.dtype)
        return Separated([Signals(0, eye, eye)], target)
    pools = _pools(sample.target)
    for width, calls in _pools(sample.view).items():
        pools.setdefault(width, []).extend(calls)
    pooled = {width: torch.cat(calls, dim=1)[:, :_ROWS] for width, calls in pools.items()}
    width, tiles = max(pooled.items(), key=lambda item: item[1].shape[1] / item[0])
    parts = []
    for start, rows in zip(tile_starts(target.shape[1], width), tiles, strict=True):
        whitener = whiten(rows)
        parts.append(Signals(start, whitener, separate(centred(rows) @ whitener)))
    return Separated(parts, None if sample.view.mixed else target)


def correlations(signals: Tensor, neurons: Tensor) -> Tensor:
    """Largest correlation, but for its sign, of each of neurons ``[n, m]`` with one of signals ``[n, k]``."""
    a, b = (centred(rows) / centred(rows).norm(dim=0).clamp_min(1e-30) for rows in (neurons, signals))
    largest: Tensor = (a.mT @ b).abs().amax(dim=1)
    return largest


def _score(guess: Separated, truth: Truth) -> Score:
    """On the target; mixed rows are not in its order, so what was learnt is tried on it under the true key."""
    neurons = truth.target_streams[PLACE]
    keyed = neurons @ truth.keys[PLACE] if guess.target is None else guess.target
    count = min(len(neurons), len(keyed))
    found, drawn = (
        torch.cat(signals, dim=1)[:count]
        for signals in (
            [part.of(keyed) for part in guess.parts],
            [part.of(keyed, drawn_turn(len(part.turn), 1 + i)) for i, part in enumerate(guess.parts)],
        )
    )
    right = correlations(found, neurons[:count])
    # Rare large values, and what positions have in common, correlate by themselves.
    elsewhere = neurons.roll(truth.target_shape[1], dims=0)[:count]
    chance = max(correlations(drawn, neurons[:count]).mean().item(), correlations(found, elsewhere).mean().item())
    return Score(right.mean().item(), chance, (right > _SEPARATED).double().mean().item())


ATTACK = Attack(
    id="A14",
    title="blind source separation",
    needs="N",
    source="Hyvärinen 1999; R7 in docs/security.md",
    metric="mean over neurons of the best correlation with a signal; value: share of neurons above 0.9",
    chance="the same with signals of a random rotation, or with another text's neurons",
    run=_run,
    score=_score,
    # Neurons of the small models depend on each other: separation is partial there, but far from chance, which is 0.19.
    fires_on="paper",
    fires_at=0.25,
)
