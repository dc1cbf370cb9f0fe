"""The worker that listens: a process for each session, forked here, and a queue for their places.

This process has one thread, computes nothing and reads nothing of any enclave, so that a fork of it is sound and no
stranger's bytes are parsed in it. What a session held is the system's again when its process ends, however it ends.

    connection -> fork -> TLS handshake and first frame -> waits in the queue -> has one of the places -> ends
                          at most `greeting_seconds`,      at most `max_waiting`  at most `max_sessions`
                          at most `max_greeting`

Between this process and each child is a socket pair. The child writes one byte when its enclave has greeted. It gets
how many sessions are before it, again and again as that changes: four bytes, 0 for its place, `FULL` for none at all.
"""

import contextlib
import ctypes
import logging
import os
import selectors
import signal
import socket
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

from obfuscatune.protocol.address import Address
from obfuscatune.protocol.hostport import source_of
from obfuscatune.worker.child import AHEAD, FULL, Service, serve_child

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Bounds:
    """How many connections there may be, in each state, and for how long.

    Attributes:
        max_sessions: served at once. max_waiting: greeted and in the queue. max_greeting: that have not greeted yet;
            max_greeting_each: of these, from one address of another machine, or one /64 of IPv6. greeting_seconds: to
            greet in, the TLS handshake included. ending_seconds: for sessions to end by themselves, when the worker
            is to end.
    """

    max_sessions: int = 1
    max_waiting: int = 64
    max_greeting: int = 64
    max_greeting_each: int = 16
    greeting_seconds: float = 30.0
    ending_seconds: float = 0.0


@dataclass(eq=False)
class _Child:
    number: int
    pid: int
    control: socket.socket
    source: str | None
    deadline: float
    told: int | None = field(default=None)


class Acceptor:
    """Accepts enclaves and keeps the books of their processes: `serve` until an interrupt."""

    def __init__(self, listener: socket.socket, service: Service, bounds: Bounds = Bounds()) -> None:
        self._listener, self._service, self._bounds = listener, service, bounds
        self._selector = selectors.DefaultSelector()
        self._greeting: list[_Child] = []
        self._waiting: list[_Child] = []  # in the order in which they greeted
        self._served: list[_Child] = []
        self._count = 0

    def serve(self) -> None:
        """Serve until an exception (KeyboardInterrupt) comes; no child is left then."""
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        try:
            while True:
                now = time.monotonic()
                for child in [c for c in self._greeting if c.deadline <= now]:
                    logger.warning("session %d: no greeting within %g s", child.number, self._bounds.greeting_seconds)
                    self._end(child)
                due = min((c.deadline for c in self._greeting), default=None)
                for key, _ in self._selector.select(None if due is None else max(0.0, due - now)):
                    if key.data is None:
                        self._accept()
                    elif key.data in self._all():  # it may have made room for another one just now
                        self._hear(key.data)
                self._advance()
        finally:
            self._leave_time()
            for child in self._all():
                self._end(child)
            self._selector.close()

    def _leave_time(self) -> None:
        """Wait for the sessions to end by themselves, within their time; nobody else is let in."""
        self._selector.unregister(self._listener)
        deadline = time.monotonic() + self._bounds.ending_seconds
        while self._served and (left := deadline - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                self._hear(key.data)

    def _accept(self) -> None:
        try:
            accepted, name = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            if self._listener.fileno() < 0 or not self._all():
                raise
            logger.warning("cannot accept a connection: %s", error.strerror)
            time.sleep(0.1)  # out of descriptors: sessions that end give some back
            return
        source = source_of(name[0]) if isinstance(name, tuple) and not Address(host=name[0]).is_local else None
        with accepted:  # the child has its own descriptor of it
            if self._has_room_for(source):
                self._fork(accepted, source)

    def _has_room_for(self, source: str | None) -> bool:
        """Whether one more may greet; where all places are taken, one of the source that has most is freed for it.

        So no few machines shut all others out: with n sources each can have its part of the places.
        """
        each = Counter(child.source for child in self._greeting)
        if source is not None and each[source] >= self._bounds.max_greeting_each:
            return False
        if len(self._greeting) < self._bounds.max_greeting:
            return True
        largest, count = each.most_common(1)[0]
        if count <= each[source] + 1:
            return False
        oldest = next(child for child in self._greeting if child.source == largest)
        logger.warning("session %d: not greeted yet, and makes room for another address", oldest.number)
        self._end(oldest)
        return True

    def _fork(self, accepted: socket.socket, source: str | None) -> None:
        self._count += 1
        parent = os.getpid()
        pair: tuple[socket.socket, ...] = ()
        try:
            pair = ours, theirs = socket.socketpair()
            pid = os.fork()
        except OSError as error:  # out of descriptors, or of processes
            logger.warning("session %d: no process for it: %s", self._count, error.strerror)
            for end in pair:
                end.close()
            return
        if pid == 0:
            self._become(parent, accepted, theirs, ours)
        theirs.close()
        ours.setblocking(False)
        child = _Child(self._count, pid, ours, source, time.monotonic() + self._bounds.greeting_seconds)
        self._greeting.append(child)
        self._selector.register(ours, selectors.EVENT_READ, child)

    def _become(self, parent: int, accepted: socket.socket, control: socket.socket, ours: socket.socket) -> None:
        """Be a session's process from here on; does not return."""
        status = 1
        try:
            # Ctrl-C and torchrun's signal go to the whole group. When sessions end is for the acceptor to decide.
            for signalled in (signal.SIGINT, signal.SIGTERM):
                signal.signal(signalled, signal.SIG_IGN)
            die_with_parent(parent)
            # Another session's descriptors: that it has ended would be seen by nobody while they are open here.
            for other in self._all():
                other.control.close()
            ours.close()
            self._selector.close()
            self._listener.close()
            serve_child(accepted, control, self._service, self._count)
            status = 0
        except BaseException as error:  # nothing may run on in a copy of the acceptor
            logger.warning("session %d: ended by %s", self._count, type(error).__name__)
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
            os._exit(status)

    def _hear(self, child: _Child) -> None:
        """A child has greeted, or is gone; one that says more than that is out of its mind, and ended."""
        try:
            said = child.control.recv(2)
        except BlockingIOError:
            return
        except OSError:
            said = b""
        if len(said) != 1 or child not in self._greeting or child.told == FULL:
            self._end(child)
        elif len(self._waiting) >= self._bounds.max_waiting + self._bounds.max_sessions - len(self._served):
            self._tell(child, FULL)  # it says so and leaves, within the time for the greeting
        else:
            self._greeting.remove(child)
            self._waiting.append(child)

    def _advance(self) -> None:
        while self._waiting and len(self._served) < self._bounds.max_sessions:
            child = self._waiting.pop(0)
            self._served.append(child)
            self._tell(child, 0)
        for ahead, child in enumerate(self._waiting, start=len(self._served)):
            self._tell(child, ahead)

    def _tell(self, child: _Child, ahead: int) -> None:
        if child.told == ahead:
            return
        child.told = ahead
        with contextlib.suppress(OSError):  # it is gone, which `_hear` hears of
            child.control.send(AHEAD.pack(ahead))

    def _end(self, child: _Child) -> None:
        self._selector.unregister(child.control)
        child.control.close()
        for place in (self._greeting, self._waiting, self._served):
            if child in place:
                place.remove(child)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)  # its end of the pair is closed, or it has to go
        _, status = os.waitpid(child.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if code not in (0, 1, -signal.SIGKILL):
            logger.warning("session %d: its process was ended by signal %d", child.number, -code)

    def _all(self) -> list[_Child]:
        return [*self._greeting, *self._waiting, *self._served]


def die_with_parent(parent: int) -> None:
    """Let the kernel end this process when its parent ends, on Linux; ``parent``: the id that it should have."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before that
        os._exit(1)
