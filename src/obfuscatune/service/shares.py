"""Room that parties share, on the disk and in the state: each has a part that the others together cannot take.

With n parties, r = total / 2n is kept for each. A party may go beyond its own r as long as there is room that is not
kept for another: alone among two it gets three quarters. Nothing is reserved by an announcement; bytes count when they
are there.
"""

from collections.abc import Callable, Mapping, Sequence

Parties = Callable[[], Sequence[str]]  # fingerprints of who may connect now


def kept_for_others(total: int, parties: Sequence[str], used: Mapping[str, int], party: str) -> int:
    """Return the bytes of ``total`` that are kept for the other parties, beside what they have used."""
    kept = total // (2 * len(parties)) if parties else 0
    return sum(max(0, kept - used.get(other, 0)) for other in parties if other != party)


def room_for(party: str, *, total: int, taken: int, used: Mapping[str, int], parties: Sequence[str]) -> int:
    """Return how many bytes more a party may take.

    Args:
        party: who asks. total: of the whole. taken: of it, by anybody. used: by party. parties: all who may connect.
    """
    return max(0, total - taken - kept_for_others(total, parties, used, party))
