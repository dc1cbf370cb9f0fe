"""Which random numbers a question gets: new ones, or, where its client asks once more, those that it had.

The enclave knows a question by all that it says, its seed too, and counts it once. A client that got no answer asks
again by itself, with the same body, and a new seed would make another question of it, which is paid for.
"""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

MOST = 256  # remembered, oldest forgotten first
SECONDS = 600.0  # that one is remembered


@dataclass
class Drawn:
    """A seed. digest: of the request it is for. state: whether its client has an answer."""

    digest: bytes
    value: int
    at: float
    state: str = "asked"  # then "answered" or "failed"


class Seeds:
    """The seeds of the last requests; used in the event loop alone. clock: seconds, of any beginning."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._drawn: list[Drawn] = []

    def take(self, digest: bytes, *, again: bool) -> Drawn:
        """Return the seed of a request; again: whether its client says that it asks once more.

        Of several requests of one digest it is the last one that failed: the others' samples are their own. If none
        has, the client has given up before it was seen to.
        """
        now = self._clock()
        self._drawn = [drawn for drawn in self._drawn if now - drawn.at < SECONDS]
        for state in ("failed", "asked", "answered") if again else ():
            for drawn in reversed(self._drawn):
                if drawn.digest == digest and drawn.state == state:
                    drawn.state = "asked"
                    return drawn
        drawn = Drawn(digest, secrets.randbits(63), now)
        self._drawn = [*self._drawn[1 - MOST :], drawn]
        return drawn
