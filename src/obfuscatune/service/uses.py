"""How many jobs have started with each sealed input: the quota `max_jobs`, kept in the sealed state.

An entry outlives the jobs that it counts. It goes when the input's terms have expired and a party needs the room;
then `State.forgotten` moves to that date, and whatever had expired by then stays over. Otherwise an operator who puts
the clock forward and back would make the enclave count from nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from obfuscatune.errors import ConsentError
from obfuscatune.parties import quotas
from obfuscatune.parties.terms import Terms
from obfuscatune.service.state import State

BYTES = 192  # that an entry counts in its party's share of the book: more than its length


@dataclass(frozen=True)
class Input:
    """A sealed input of a job: its digest, whose it is, and its terms."""

    digest: str
    party: str
    terms: Terms


class Uses:
    """The counts in a state, whose lock its caller holds."""

    def __init__(self, state: State) -> None:
        self._state = state

    def count_of(self, digest: str) -> int:
        """Return how many jobs have started with an input."""
        return int(self._state.uses.get(digest, "0").split()[0])

    def check(self, inputs: Mapping[str, Input]) -> None:
        """Check that one more job may start with these inputs, by kind.

        Raises:
            ConsentError: a quota is used up, or was forgotten with terms that have expired.
        """
        for kind, each in inputs.items():
            expires = each.terms.expires
            if each.digest not in self._state.uses and expires != "never" and expires <= self._state.forgotten:
                raise ConsentError(f"terms of the {kind} have expired")
            quotas.require({kind: each.terms}, "max_jobs", self.count_of(each.digest) + 1)

    def count(self, inputs: Mapping[str, Input]) -> Callable[[], None]:
        """Count a job that starts; return what undoes this."""
        before = dict(self._state.uses)
        for each in inputs.values():
            self._state.uses[each.digest] = f"{self.count_of(each.digest) + 1} {each.terms.expires} {each.party}"

        def undo() -> None:
            self._state.uses.clear()
            self._state.uses.update(before)

        return undo

    def used(self) -> list[str]:
        """Return whose each entry is."""
        return [entry.split()[2] for entry in self._state.uses.values()]

    def forget(self, now: float, named: set[str]) -> None:
        """Drop the entries of inputs whose terms have expired, and which no job in the book needs."""
        for digest, entry in list(self._state.uses.items()):
            expires = entry.split()[1]
            if expires != "never" and int(expires) <= now and digest not in named:
                self._state.forgotten = max(self._state.forgotten, int(expires))
                del self._state.uses[digest]
