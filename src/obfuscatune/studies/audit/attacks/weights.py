"""What attacks on weights share: which of them there are, how a guess is scored."""

from collections.abc import Callable

from torch import Tensor

from obfuscatune.studies.audit.attack import Score, Truth
from obfuscatune.studies.audit.view import ROLES, WorkerView

Guess = dict[tuple[int, str], Tensor]  # plain weights by block and role

# R1: a key on each side leaves nothing to a base; up to .05 of the difference to it is allowed for luck.
CHANCE = 0.05
METRIC = "share of |W - W0|^2 that is recovered, of the kind of weight where it is most"


def each_weight(view: WorkerView, guess: Callable[[int, str, Tensor], Tensor | None]) -> Guess:
    """Return what a function of block, role and keyed weight finds, where it finds something."""
    places = [(block, role) for block in range(view.blocks) for role in ROLES]
    found = {place: guess(*place, view.weight(*place)) for place in places}
    return {place: weight for place, weight in found.items() if weight is not None}


def score_weights(guess: Guess, truth: Truth) -> Score:
    """``1 - |W^ - W|^2 / |W - W0|^2``, all blocks together, of the best role; value: its square root's complement."""
    best = 0.0
    for role in ROLES:
        mine = [block for block, name in guess if name == role]
        wrong = sum((guess[block, role] - truth.private.weight(block, role)).square().sum().item() for block in mine)
        moved = sum(
            (truth.private.weight(block, role) - truth.base.weight(block, role)).square().sum().item() for block in mine
        )
        best = max(best, 1 - wrong / moved) if mine else best
    return Score(best, CHANCE, (1 - best) ** 0.5)
