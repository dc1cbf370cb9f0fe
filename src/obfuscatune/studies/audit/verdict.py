"""Figures to words: what an attack found of a profile, and whether that is what the profile claims."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from obfuscatune.studies.audit.runner import Outcome

# A success of so much above chance is none, where few seeds make the standard error small by luck.
SLACK = 0.02
STANDARD_ERRORS = 3.0

# What a profile claims, by attack: at chance at every token budget. What is not here is claimed of no profile, whatever
# the figures are. `enclave` hands nothing over, and is not attacked. `strict` claims nothing against a near base: A1
# and A3 are at chance there, and A27 takes the weights all the same. Nor does it claim A7 and A17: they take q, k and v
# for plain or for keyed in each head, and there a key of its own lies on all their columns, so they would fail without
# any mixing.
# What is claimed against the one worker that has all blocks, is claimed against some of several.
# One worker of `shared` sees uniformly random numbers, so everything is claimed but A22: shapes and times.
CLAIMS: dict[str, tuple[str, ...]] = {
    "strict": ("A11", "A12", "A14", "A21", "A23", "A24", "A26"),
    "shared": tuple(f"A{number}" for number in range(1, 28) if number != 22),
}

AS_CLAIMED = "at chance, as claimed"
CHANCE = "at chance, not claimed"
BROKEN = "BROKEN"
LEAK = "KNOWN LEAK"
NONE = "nothing to attack"
VOID = "void: a control failed"  # or it could not be run


@dataclass(frozen=True, slots=True)
class Point:
    """Outcomes of all seeds at one budget."""

    tokens: int
    success: float
    error: float  # standard, over the seeds
    chance: float
    value: float | None

    @property
    def limit(self) -> float:
        """Success up to which it counts as chance."""
        return self.chance + max(STANDARD_ERRORS * self.error, SLACK)

    @property
    def above(self) -> bool:
        """Whether the attack learnt something."""
        return self.success > self.limit


@dataclass(frozen=True, slots=True)
class Verdict:
    """One profile under one attack."""

    profile: str
    attack: str
    word: str
    claimed: bool
    points: tuple[Point, ...] = ()
    reason: str = ""
    since: int | None = field(default=None)  # the least budget at which it is above chance

    @property
    def failed(self) -> bool:
        """Whether a claim does not hold, or cannot be concluded to hold."""
        return self.claimed and self.word in (BROKEN, VOID)

    def __str__(self) -> str:
        """The word, with the success and the budget that it took."""
        if self.word == NONE or not self.points:
            return self.word
        best = max(self.points, key=lambda point: point.success - point.chance)
        figure = f"{best.success:.2f} (chance {max(best.chance, 0.0):.2f})"
        return f"{self.word} {figure}" + (f" from {self.since:,} tokens" if self.since is not None else "")


@dataclass(frozen=True, slots=True)
class Control:
    """One control of one attack, or one canary."""

    name: str
    kind: str
    passed: bool
    got: str
    expected: str


def points_of(outcomes: Iterable[Outcome]) -> tuple[Point, ...]:
    """Outcomes of one profile and attack, gathered over seeds, one point a budget."""
    by_tokens: dict[int, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.reason is None:
            by_tokens.setdefault(outcome.tokens, []).append(outcome)
    return tuple(_point(tokens, found) for tokens, found in sorted(by_tokens.items()))


def judge(profile: str, attack: str, outcomes: Sequence[Outcome], *, fires: bool, silent: bool) -> Verdict:
    """Return the verdict.

    Args:
        fires: whether its positive control passed; without that, chance is void. silent: whether its negative control
            did; without that, all is.
    """
    name = profile.partition("@")[0]
    claimed = attack in CLAIMS.get(name, ())
    points = points_of(outcomes)
    if not points:
        reason = next((outcome.reason for outcome in outcomes if outcome.reason), "not run")
        # In `strict` there is something of all kinds that are claimed: an attack that finds none has not been run. One
        # worker of `shared` has no keys, and so nothing for some attacks.
        word = VOID if claimed and name == "strict" else NONE
        return Verdict(profile, attack, word, claimed, reason=reason)
    since = next((point.tokens for point in points if point.above), None)
    if silent and since is not None:  # found is found
        return Verdict(profile, attack, BROKEN if claimed else LEAK, claimed, points, since=since)
    if not (fires and silent):
        return Verdict(profile, attack, VOID, claimed, points)
    return Verdict(profile, attack, AS_CLAIMED if claimed else CHANCE, claimed, points)


def positive(attack: str, outcomes: Sequence[Outcome], least: float, profile: str) -> Control:
    """The control that the attack succeeds where it must."""
    points = points_of(outcomes)
    reached = points[-1].success if points else math.nan
    got = f"{reached:.2f} on {profile}" if points else f"not run on {profile}: {outcomes[0].reason}"
    return Control(attack, "positive", bool(points) and reached >= least, got, f"at least {least:.2f}")


def negative(attack: str, outcomes: Sequence[Outcome], profile: str) -> Control:
    """The control that it finds nothing where there is nothing."""
    points = points_of(outcomes)
    if not points:
        return Control(attack, "negative", False, f"not run on {profile}: {outcomes[0].reason}", "chance")
    point = points[-1]
    return Control(
        attack, "negative", not point.above, f"{point.success:.2f} on {profile}", f"at most {point.limit:.2f}"
    )


def _point(tokens: int, outcomes: Sequence[Outcome]) -> Point:
    successes = [outcome.success for outcome in outcomes if outcome.success is not None]
    error = statistics.stdev(successes) / math.sqrt(len(successes)) if len(successes) > 1 else 0.0
    chance = statistics.fmean(outcome.chance for outcome in outcomes if outcome.chance is not None)
    values = [outcome.value for outcome in outcomes if outcome.value is not None]
    return Point(tokens, statistics.fmean(successes), error, chance, statistics.fmean(values) if values else None)
