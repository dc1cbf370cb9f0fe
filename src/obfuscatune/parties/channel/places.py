"""Places that are shared by all who want one: whoever holds the most makes room, so nobody can shut the others out.

A table of places has owners: the source of a connection before it has said who it is, the party after that. While
there is room anybody takes as many as he likes. When there is none, a newcomer gets a place of the owner who holds the
most (max-min fairness): with n owners each can have total / n, whatever the others do.
"""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from obfuscatune.errors import BusyError

TRY_AGAIN = "try again in some seconds"


class Holder(Protocol):
    """What holds a place: one connection."""

    @property
    def idle(self) -> bool:
        """Whether it waits for its peer."""
        ...

    def leave(self) -> None:
        """End it soon; called from another thread, and must not block."""
        ...


class Places:
    """A table of ``total`` places. Every method may be called from several threads.

    Args:
        total: of all owners together.
        newest_first: whether an owner who holds the most and wants one more loses his oldest. Strangers: yes, since
            those who say nothing grow old. Parties: no, a connection that was let in stays.
    """

    def __init__(self, total: int, *, newest_first: bool) -> None:
        self._total, self._newest_first = total, newest_first
        self._lock = threading.Lock()
        self._held: dict[str, list[Holder]] = {}  # oldest first

    def enter(self, owner: str, holder: Holder) -> None:
        """Take a place for ``owner``; another's connection may have to leave for it.

        Raises:
            BusyError: all places are taken, and nobody holds more than this owner.
        """
        loser = None
        with self._lock:
            if sum(map(len, self._held.values())) >= self._total:
                largest = max(self._held, key=lambda name: len(self._held[name]))
                # Of equals nobody gives up a place; the newcomer counts with what it would have.
                if not self._newest_first and len(self._held[largest]) <= len(self._held.get(owner, ())) + 1:
                    raise BusyError("all connections are taken", hint=TRY_AGAIN)
                candidates = self._held[largest]
                loser = next((one for one in candidates if one.idle), candidates[0])
                self._remove(largest, loser)
            self._held.setdefault(owner, []).append(holder)
        if loser is not None:
            loser.leave()

    def exit(self, owner: str, holder: Holder) -> None:
        """Give the place back; does nothing where it was lost."""
        with self._lock:
            self._remove(owner, holder)

    def _remove(self, owner: str, holder: Holder) -> None:
        held = self._held.get(owner, [])
        if holder in held:
            held.remove(holder)
            if not held:
                del self._held[owner]


class Turns:
    """A lock that its owners get by turns: one who asks a thousand times keeps another waiting for one turn only."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # of the two below
        self._waiting: dict[str, deque[threading.Event]] = {}  # in the order of the owners' turns
        self._taken = False

    @contextmanager
    def turn(self, owner: str) -> Iterator[None]:
        """Hold the lock for ``owner``, after those whose turn comes before."""
        ticket = threading.Event()
        with self._lock:
            if self._taken:
                self._waiting.setdefault(owner, deque()).append(ticket)
            else:
                self._taken = True
                ticket.set()
        ticket.wait()
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        with self._lock:
            if not self._waiting:
                self._taken = False
                return
            owner, queue = next(iter(self._waiting.items()))
            del self._waiting[owner]
            queue.popleft().set()
            if queue:  # to the end of the round
                self._waiting[owner] = queue
