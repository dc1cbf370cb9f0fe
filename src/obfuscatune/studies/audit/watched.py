"""Whose recordings an attack gets where a keyed model has several workers: ``balanced@1of2`` those of one, alone.

The workers have runs of blocks that follow each other, and those that pool their recordings are neighbours: what they
have together is again a run of blocks. To an attack it is a model of its own, whose blocks count from 0. Its truth is
that part of the private model.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from obfuscatune.errors import UsageError
from obfuscatune.profiles import Profile
from obfuscatune.studies.audit.view import WorkerView
from obfuscatune.studies.bench.run import parse_profile

_FORM = re.compile(r"([1-9])of([1-9])")


@dataclass(frozen=True, slots=True)
class Watched:
    """A profile on some workers, of which so many pool what they recorded."""

    profile: Profile
    together: int = 1
    workers: int = 1

    @classmethod
    def parse(cls, text: str) -> "Watched":
        """Read ``PROFILE`` or ``PROFILE@KofN``, the profile as `parse_profile` takes it.

        Raises:
            UsageError: another form, more than there are, or a profile of shares, which has its workers by itself.
        """
        name, separator, who = text.partition("@")
        profile = parse_profile(name)
        if not separator:
            return cls(profile)
        found = _FORM.fullmatch(who)
        together, workers = (int(found[1]), int(found[2])) if found is not None else (2, 1)
        if together > workers or profile.shares:
            expected = "KofN, K of N workers together, of a profile with keys: balanced@1of2, balanced@2of2"
            raise UsageError("whose recordings", got=who, expected=expected, where=f"--profile {text}")
        return cls(profile, together, workers)

    def chosen(self, operator: int) -> range:
        """Return the numbers of the workers that pool. operator: any number, which chooses among all neighbours."""
        first = operator % (self.workers - self.together + 1)
        return range(first, first + self.together)

    def run(self, counts: Sequence[int], operator: int) -> range:
        """Return the blocks that these have, of how many blocks each worker has, in the workers' order."""
        ends, chosen = [0, *accumulate(counts)], self.chosen(operator)
        return range(ends[chosen.start], ends[chosen.stop])


def pool(views: Sequence[WorkerView]) -> WorkerView:
    """Return what workers have together, in the order of their blocks: passes of all go through all of them.

    Raises:
        ValueError: they have seen different numbers of passes, so they are not of one session.
    """
    passes = []
    for parts in zip(*(view.passes for view in views), strict=True):
        ordered = parts[::-1] if parts[0] and parts[0][0].backward else parts
        passes.append(tuple(call for calls in ordered for call in calls))
    segments = {f"{i}.{name}": found for i, view in enumerate(views) for name, found in view.segments.items()}
    held = {place: factors for view in views for place, factors in view.held.items()}
    return WorkerView(segments, tuple(passes), held)
