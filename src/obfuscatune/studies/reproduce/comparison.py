"""Two runs of the same items, side by side: which predictions differ, in whose favour, and by how little."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Item = dict[str, Any]  # the fields of `obfuscatune.studies.tasks.harness.Prediction`
_PREDICTED = ("choice", "choice_norm", "greedy")


@dataclass(frozen=True)
class Flip:
    """One item that two runs predict differently.

    Args:
        what: of ``choice``, ``choice_norm`` and ``greedy``, those that differ.
        margin: nats from the reference's choice to its runner-up. shift: largest change of a likelihood, in nats.
    """

    id: str
    what: str
    margin: float
    shift: float


@dataclass(frozen=True)
class Comparison:
    """A run against a reference on the same items.

    Args:
        items: their count. flips: items with any prediction that differs.
        lost, won: items right in the reference alone, and in the other alone.
        shift: largest change of a likelihood, in nats.
    """

    items: int
    flips: tuple[Flip, ...]
    lost: int
    won: int
    shift: float

    @property
    def p_value(self) -> float:
        """McNemar's exact two-sided test: how likely so uneven a split of lost and won is if neither run is better."""
        return mcnemar(self.lost, self.won)


def compare(reference: Sequence[Item], other: Sequence[Item]) -> Comparison:
    """Compare predictions item by item. Raises ValueError where the items are not the same."""
    if [item["id"] for item in reference] != [item["id"] for item in other]:
        raise ValueError("two runs on different items")
    flips, lost, won, largest = [], 0, 0, 0.0
    for ours, theirs in zip(reference, other, strict=True):
        shift = max(abs(a - b) for a, b in zip(ours["likelihoods"], theirs["likelihoods"], strict=True))
        largest = max(largest, shift)
        differing = [name for name in _PREDICTED if _plain(ours[name]) != _plain(theirs[name])]
        if differing:
            flips.append(Flip(ours["id"], " ".join(differing), _margin(ours["likelihoods"]), shift))
        lost += is_right(ours) and not is_right(theirs)
        won += is_right(theirs) and not is_right(ours)
    return Comparison(len(reference), tuple(flips), lost, won, largest)


def is_right(item: Item) -> bool:
    """Whether the harness counts the item: ``acc``; with several right answers, ``exact_match``."""
    if _all_right(item):
        return bool(set(item["greedy"]) & set(item["answers"]))
    return item["choice"] in item["answers"]


def mcnemar(lost: int, won: int) -> float:
    """Return ``P(|X - n/2| >= |lost - n/2|)`` for X binomial with ``n = lost + won`` and 1/2; 1 where n is 0."""
    n = lost + won
    tail = sum(math.comb(n, k) for k in range(min(lost, won) + 1))
    return min(1.0, float(2 * tail / 2**n))


def _plain(value: Any) -> Any:
    """A prediction as JSON gives it back: a tuple is a list."""
    return list(value) if isinstance(value, tuple) else value


def _all_right(item: Item) -> bool:
    # All of a question's choices are right answers in WebQuestions, and one of several in the others.
    return len(item["answers"]) == len(item["likelihoods"])


def _margin(likelihoods: Sequence[float]) -> float:
    if len(likelihoods) < 2:
        return math.inf
    first, second = sorted(likelihoods, reverse=True)[:2]
    return first - second
