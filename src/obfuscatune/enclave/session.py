"""The enclave's end of a session: requests to the worker, and the checks on every reply.

Several requests may be under way; the worker answers them in order. The worker is not trusted to be right. A reply is
used only if it has the id of its request, exactly the tensors expected, of exactly the expected shapes and dtypes.
Anything else, a timeout and a dead worker become one :class:`~obfuscatune.errors.WorkerFault`, after which the session
is closed for good, so that a late reply can never be taken for a later one. A reply with a number that is not finite is
not used either; an honest worker's may have one, so it is no fault.
"""

import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from obfuscatune.enclave.lifetime import Lifetime
from obfuscatune.enclave.replies import Pending, refuse_not_finite
from obfuscatune.enclave.shelf import Expected, Shelf, is_large
from obfuscatune.enclave.traffic import Counts
from obfuscatune.errors import BusyError, UsageError
from obfuscatune.protocol.arena import PLACED, Arena
from obfuscatune.protocol.connection import Connection, Frame
from obfuscatune.protocol.frames import PROTOCOL_VERSION

# What the worker can be told to forget; of each so many with one request: a header holds some thousands of values.
DROPPED = ("calls", "caches", "shared")
_MAX_DROPS = 1000
GREETING_SECONDS = 60.0  # six signs of life of a worker's queue; without one, at most


class Session(Lifetime):
    """Requests to one worker over one connection. Refuses to be copied or pickled, and so does a model around it.

    For any number of threads. Replies are read by whoever waits for one, and by whoever sends while the worker takes
    no more bytes, which may be because it is sending itself.

    Args:
        connection, worker, timeout, process: see `Lifetime`.
        queue: whether to wait where the worker's places are taken.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        worker: str,
        timeout: float,
        process: "subprocess.Popen[bytes] | None" = None,
        queue: bool = True,
    ) -> None:
        super().__init__(connection, worker=worker, timeout=timeout, process=process)
        self.traffic, self._queue = Counts(), queue
        self._dropped: dict[str, list[int]] = {kind: [] for kind in DROPPED}
        self._under_way: deque[Pending] = deque()
        self._sending, self._receiving = threading.RLock(), threading.RLock()
        self._shelf: Shelf | None = None
        self._ahead: int | None = None  # sessions before this one in the worker's queue

    @property
    def shares_memory(self) -> bool:
        """Whether large tensors go through memory that the worker shares."""
        return self._shelf is not None

    def hello(self) -> dict[str, Any]:
        """Greet the worker; returns what it says of itself. Raises WorkerFault where it speaks another version.

        A worker whose places are taken says so every few seconds: whatever else listens there is silent, and is not
        waited for as long as for a result.
        """
        timeout = self._timeout
        if self.process is None:
            self._timeout = min(timeout, GREETING_SECONDS)
            self.connection.settimeout(self._timeout)
        reply, _ = self.request("hello", "-", {}, {}, {})
        self._timeout = timeout
        self.connection.settimeout(timeout)
        if reply.get("version") != PROTOCOL_VERSION:
            got = ascii(reply.get("version"))[:20]
            raise self.fault("another protocol version", "-", got=got, expected=PROTOCOL_VERSION)
        if reply.get("arena") is True and self.connection.shares_memory:
            self._share_memory()
        return reply

    def _share_memory(self) -> None:
        """Pass the worker of this machine an arena for the large tensors of its calls."""
        made = Arena.create()
        if made is None:
            return
        arena, descriptor = made
        try:
            reply, _ = self.submit("arena", "-", {"bytes": arena.size}, {}, {}, descriptor=descriptor).result()
        finally:
            os.close(descriptor)
        if reply.get("mapped") is True:  # it is not where a relay between the two passes bytes alone
            self._shelf = Shelf(arena)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return memory for a tensor that will be sent: where the worker reads it without a copy, if there is room."""
        # A forked process has the first one's memory, where that one's requests lie.
        shelf = self._shelf  # which another thread may take away, with the session's end
        found = None if shelf is None or self.is_copy() else shelf.take(shape, dtype)
        return torch.empty(*shape, dtype=dtype) if found is None else found

    def drop(self, kind: str, number: int) -> None:
        """Let the worker forget a call, a KV cache or a shared tensor, with the next request; for finalizers too."""
        self._dropped[kind].append(number)

    def request(
        self, op: str, layer: str, header: dict[str, Any], tensors: Mapping[str, Tensor], expected: Expected
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Send one request and return its checked reply; see `submit` and `Pending.result`."""
        return self.submit(op, layer, header, tensors, expected).result()

    def submit(
        self,
        op: str,
        layer: str,
        header: dict[str, Any],
        tensors: Mapping[str, Tensor],
        expected: Expected,
        *,
        optional: Expected | None = None,
        descriptor: int | None = None,
    ) -> Pending:
        """Send one request, and return what its reply is had from.

        Args:
            op: name of the operation. layer: path of the layer it serves, for messages; never sent.
            header: the operation's own fields. tensors: keyed tensors by wire name; not to be changed before the reply.
            expected: names, shapes and dtypes of the reply's tensors. optional: of those that it may have besides.
            descriptor: of a file that is passed to a worker of this machine.

        Raises:
            WorkerFault: naming worker, layer and call.
            NotFiniteError: a number is NaN or infinite; nothing was sent, and the session goes on.
            UsageError: the protected model was closed before, or is of the process that this one was forked from; or
                the request is beyond the limits of a frame: then nothing was sent, and the session goes on.
        """
        refuse_not_finite(tensors, layer)
        with self._turn(self._sending, layer):
            self.refuse_ended(layer)
            self._last_id += 1
            pending = Pending(self, op, layer, self._last_id, expected, optional or {})
            dropped: dict[str, list[int]] = {}
            placed = 0
            started = time.perf_counter()
            try:
                message = {"id": pending.id, "op": op, **header}
                dropped = {kind: taken for kind, ids in self._dropped.items() if (taken := _take(ids))}
                if dropped:
                    message["drop"] = dropped
                shelf = self._shelf
                if shelf is not None and op in PLACED and is_large(tensors, expected):
                    tensors, fields, pending.placed = shelf.place(tensors, expected)
                    message |= fields
                    placed = pending.placed.bytes_sent
                busy = bool(self._under_way)
                self._bound_wait()
                self._under_way.append(pending)  # first, because the reply may come before the last byte is sent
                sent = self.connection.send(
                    message, tensors, meanwhile=self._read_meanwhile if busy else None, descriptor=descriptor
                )
            except UsageError:  # beyond the limits, so not a byte of it was sent
                self._under_way.remove(pending)
                for kind, ids in dropped.items():
                    self._dropped[kind][:0] = ids
                raise
            except BaseException as error:
                self._break(error, layer, pending.id)
                raise
            self.traffic.add(op, calls=1, bytes_sent=sent + placed, seconds=time.perf_counter() - started)
            return pending

    def await_reply(self, pending: Pending) -> None:
        """Read replies, in their order, up to the one of ``pending``."""
        started = time.perf_counter()
        with self._turn(self._receiving, pending.layer):
            while not pending.has_come:
                self.refuse_ended(pending.layer)
                try:
                    self._bound_wait()
                    self._hand_over(self.connection.receive_frame(max_payload=self._under_way[0].most))
                except BaseException as error:
                    self._break(error, pending.layer, pending.id)
                    raise
        self.traffic.add(pending.op, seconds=time.perf_counter() - started)

    def _read_meanwhile(self) -> bool:
        """Read what has come of the next reply; False where another thread waits for it."""
        if not self._receiving.acquire(blocking=False):
            return False
        try:
            if not self._under_way:
                return False
            frame = self.connection.receive_part(max_payload=self._under_way[0].most)
            if frame is not None:
                self._hand_over(frame)
            return True
        finally:
            self._receiving.release()

    def _hand_over(self, frame: Frame) -> None:
        if self._under_way[0].op == "hello" and "queued" in frame.fields and not self._under_way[0].has_come:
            self._say_queued(frame.fields["queued"])
            return
        pending = self._under_way.popleft()
        pending.take(frame)
        self.traffic.add(pending.op, bytes_received=frame.size)

    def _say_queued(self, ahead: object) -> None:
        """The worker has no place yet, and says so again and again: the wait for a reply starts anew each time."""
        if not self._queue:
            hint = "obfuscatune worker --max_sessions 2, or once it has a place"
            raise BusyError("the worker has no place for another session", where=self.worker, hint=hint)
        # Signs of life are some seconds apart, however soon results are wanted. `hello` takes this back.
        self._timeout = max(self._timeout, GREETING_SECONDS)
        self.connection.settimeout(self._timeout)
        if type(ahead) is int and 0 < ahead < (self._ahead or 2**32):  # nobody jumps a queue
            self._ahead = ahead
            sessions = "1 session" if ahead == 1 else f"{ahead} sessions"
            print(f"waiting for the worker at {self.worker}: {sessions} ahead", file=sys.stderr, flush=True)

    def _end(self, reason: str) -> None:
        super()._end(reason)
        if not self.is_copy():
            self._shelf = None  # a model may be kept long after: its memory is the system's once no tensor lies there


def _take(ids: list[int]) -> list[int]:
    """Remove and return the first ids; a finalizer may append to the list meanwhile."""
    taken = ids[:_MAX_DROPS]
    del ids[: len(taken)]
    return taken
