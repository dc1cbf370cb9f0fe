"""What crossed between an enclave and a worker, counted by kind of request."""

import threading
from collections import defaultdict
from dataclasses import dataclass


@dataclass(slots=True)
class Traffic:
    """Counts of one kind of request: calls, bytes in both directions, seconds spent waiting for replies."""

    calls: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.calls + other.calls,
            self.bytes_sent + other.bytes_sent,
            self.bytes_received + other.bytes_received,
            self.seconds + other.seconds,
        )


class Counts(defaultdict[str, Traffic]):
    """The traffic of each kind of request; for any number of threads."""

    def __init__(self) -> None:
        super().__init__(Traffic)
        self._counting = threading.Lock()

    def add(self, op: str, **counts: float) -> None:
        """Add to the traffic of one kind of request."""
        with self._counting:
            traffic = self[op]
            for name, count in counts.items():
                setattr(traffic, name, getattr(traffic, name) + count)
