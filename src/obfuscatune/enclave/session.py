"""The enclave's end of a session: requests to the worker, and the checks on every reply.

Several requests may be under way; the worker answers them in order. The worker is not trusted to be right. A reply is
used only if it has the id of its request, exactly the tensors expected, of exactly the expected shapes and dtypes.
Anything else, a timeout and a dead worker become one :class:`~obfuscatune.errors.WorkerFault`, after which the session
is closed for good, so that a late reply can never be taken for a later one. A reply with a number that is not finite is
not used either; an honest worker's may have one, so it is no fault.
"""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from obfuscatune.enclave.keys.source import Secret
from obfuscatune.enclave.replies import Pending, refuse_not_finite
from obfuscatune.enclave.shelf import Expected, Shelf, is_large
from obfuscatune.errors import BusyError, ConnectionClosedError, ProtocolError, UsageError, WorkerFault
from obfuscatune.protocol.arena import PLACED, Arena
from obfuscatune.protocol.connection import Connection, Frame
from obfuscatune.protocol.frames import PROTOCOL_VERSION

# What the worker can be told to forget; of each so many with one request: a header holds some thousands of values.
DROPPED = ("calls", "caches", "shared")
_MAX_DROPS = 1000
GREETING_SECONDS = 60.0  # six signs of life of a worker's queue; without one, at most
ENDING_SECONDS = 10.0  # for a spawned worker to leave by itself
_LEAST_SECONDS = 0.001  # beyond a deadline: what has come is still read


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


class Session(Secret):
    """Requests to one worker over one connection. Refuses to be copied or pickled, and so does a model around it.

    For any number of threads. Replies are read by whoever waits for one, and by whoever sends while the worker takes
    no more bytes, which may be because it is sending itself.

    Args:
        connection: connected, nothing sent yet.
        worker: how messages name the worker: its address, or ``spawned process N``.
        timeout: seconds to wait for one reply.
        process: the worker's process where this enclave started it.
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
        self.connection, self.worker, self.process = connection, worker, process
        self.traffic: defaultdict[str, Traffic] = defaultdict(Traffic)
        self._timeout, self._queue = timeout, queue
        self._deadline: float | None = None
        self._last_id = 0
        self._dropped: dict[str, list[int]] = {kind: [] for kind in DROPPED}
        self._under_way: deque[Pending] = deque()
        self._sending, self._receiving, self._counting = threading.RLock(), threading.RLock(), threading.Lock()
        self._ended: str | None = None
        self._process_id = os.getpid()
        self._shelf: Shelf | None = None
        self._ahead: int | None = None  # sessions before this one in the worker's queue
        connection.settimeout(timeout)

    @property
    def has_ended(self) -> bool:
        """Whether it was closed, or ended by a fault."""
        return self._ended is not None

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
            reply, _ = self._submit("arena", "-", {"bytes": arena.size}, {}, {}, descriptor=descriptor).result()
        finally:
            os.close(descriptor)
        if reply.get("mapped") is True:  # it is not where a relay between the two passes bytes alone
            self._shelf = Shelf(arena)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return memory for a tensor that will be sent: where the worker reads it without a copy, if there is room."""
        # A forked process has the first one's memory, where that one's requests lie.
        shelf = self._shelf  # which another thread may take away, with the session's end
        found = None if shelf is None or self._is_copy() else shelf.take(shape, dtype)
        return torch.empty(*shape, dtype=dtype) if found is None else found

    def drop(self, kind: str, number: int) -> None:
        """Let the worker forget a call, a KV cache or a shared tensor, with the next request; for finalizers too."""
        self._dropped[kind].append(number)

    def limit(self, seconds: float) -> None:
        """Wait this long at most from now on, for all replies together: for the last requests of a session.

        Another thread that waits already goes on waiting; it is not waited for any longer than that.
        """
        self._timeout = min(self._timeout, seconds)
        self._deadline = time.monotonic() + seconds

    def _bound_wait(self) -> None:
        if self._deadline is not None:
            self.connection.settimeout(max(_LEAST_SECONDS, min(self._timeout, self._deadline - time.monotonic())))

    @contextlib.contextmanager
    def _turn(self, lock: "threading.RLock", layer: str) -> Iterator[None]:
        """Hold a lock. Beyond the deadline, whoever has it waits for a worker that is silent, and the session ends."""
        seconds = -1 if self._deadline is None else max(_LEAST_SECONDS, self._deadline - time.monotonic())
        if not lock.acquire(timeout=seconds):
            raise self.fault(f"no reply within {self._timeout:g} s", layer)
        try:
            yield
        finally:
            lock.release()

    def request(
        self, op: str, layer: str, header: dict[str, Any], tensors: Mapping[str, Tensor], expected: Expected | None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Send one request and return its checked reply; see `submit` and `Pending.result`."""
        return self.submit(op, layer, header, tensors, expected).result()

    def submit(
        self, op: str, layer: str, header: dict[str, Any], tensors: Mapping[str, Tensor], expected: Expected | None
    ) -> Pending:
        """Send one request, and return what its reply is had from.

        Args:
            op: name of the operation. layer: path of the layer it serves, for messages; never sent.
            header: the operation's own fields. tensors: keyed tensors by wire name; not to be changed before the reply.
            expected: names, shapes and dtypes of the reply's tensors; ``None`` takes whatever comes (exports).

        Raises:
            WorkerFault: naming worker, layer and call.
            NotFiniteError: a number is NaN or infinite; nothing was sent, and the session goes on.
            UsageError: the protected model was closed before, or is of the process that this one was forked from; or
                the request is beyond the limits of a frame: then nothing was sent, and the session goes on.
        """
        refuse_not_finite(tensors, layer)
        return self._submit(op, layer, header, tensors, expected)

    def _submit(
        self,
        op: str,
        layer: str,
        header: dict[str, Any],
        tensors: Mapping[str, Tensor],
        expected: Expected | None,
        *,
        descriptor: int | None = None,
    ) -> Pending:
        with self._turn(self._sending, layer):
            self._refuse_ended(layer)
            self._last_id += 1
            pending = Pending(self, op, layer, self._last_id, expected)
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
                    tensors, fields, pending.placed = shelf.place(tensors, expected or {})
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
                self._break(error, layer)
                raise
            self.count(op, calls=1, bytes_sent=sent + placed, seconds=time.perf_counter() - started)
            return pending

    def await_reply(self, pending: Pending) -> None:
        """Read replies, in their order, up to the one of ``pending``."""
        started = time.perf_counter()
        with self._turn(self._receiving, pending.layer):
            while not pending.has_come:
                self._refuse_ended(pending.layer)
                try:
                    self._bound_wait()
                    self._hand_over(self.connection.receive_frame(max_payload=self._under_way[0].most))
                except BaseException as error:
                    self._break(error, pending.layer)
                    raise
        self.count(pending.op, seconds=time.perf_counter() - started)

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
        self.count(pending.op, bytes_received=frame.size)

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

    def count(self, op: str, **counts: float) -> None:
        """Add to the traffic of one kind of request."""
        with self._counting:
            traffic = self.traffic[op]
            for name, count in counts.items():
                setattr(traffic, name, getattr(traffic, name) + count)

    def _is_copy(self) -> bool:
        """Whether this is the copy in a process that was forked: the connection is not its own."""
        return os.getpid() != self._process_id

    def _refuse_ended(self, layer: str) -> None:
        if self._is_copy():
            hint = "protect the model in the process that runs it; the session of the first process goes on"
            raise UsageError("a protected model in a process that was forked", where=layer, hint=hint)
        if self._ended is not None:
            hint = (
                "load the model again and protect that, with a worker that runs; an adapter in the enclave can be saved"
            )
            raise UsageError(self._ended, where=layer, hint=hint)

    def _break(self, error: BaseException, layer: str) -> None:
        """End the session after an error on the connection, and raise the one that tells it; or return, to raise it."""
        if isinstance(error, ConnectionClosedError):
            self._refuse_ended(layer)  # closed here, by another thread
            status = self._exit_status()
            if status == "exit status 2" and self._last_id <= 1:
                self._end("the worker has not started")
                raise UsageError("the worker that was started here refuses its options", hint="it says why, above")
            raise self.fault("the worker is gone", layer, got=status) from error
        if isinstance(error, TimeoutError):
            raise self.fault(f"no reply within {self._timeout:g} s", layer) from error
        if isinstance(error, ProtocolError):
            raise self.fault("the reply breaks the protocol", layer, got=error.what) from error
        # An interrupt between two bytes: the connection cannot be used again.
        self._end("the session was interrupted in the middle of a request")

    def _exit_status(self) -> str | None:
        if self.process is None:
            return None
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "a closed connection, from a process that still runs"
        return f"exit status {code}" if code >= 0 else f"killed by signal {-code}"

    def fault(self, what: str, layer: str, *, call: int | None = None, **details: Any) -> WorkerFault:
        """End the session and return the error to raise; ``what`` was wrong with the reply to ``call``, or the last."""
        if self._last_id <= 1:  # the greeting
            own, other = "its own words are above", "is an obfuscatune worker of this version what listens there"
            details.setdefault("hint", other if self.process is None else own)
        fault = WorkerFault(what, worker=self.worker, layer=layer, call=call or self._last_id, **details)
        self._end(f"the worker's session ended by an earlier fault ({what})")
        return fault

    def _end(self, reason: str) -> None:
        self._ended = self._ended or reason
        if self._is_copy():  # to close the connection would end it for the first process too
            return
        self.connection.close()
        self._shelf = None  # a model may be kept long after: its memory is the system's once no tensor lies there
        if self.process is not None and self.process.poll() is None:
            try:
                self.process.wait(timeout=ENDING_SECONDS)  # it leaves by itself when the connection closes
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def close(self) -> None:
        """End the session; a worker that this enclave started ends with it. May be called again, by any thread.

        Requests that are under way in other threads end with an error.
        """
        self._end("the protected model was closed")


def _take(ids: list[int]) -> list[int]:
    """Remove and return the first ids; a finalizer may append to the list meanwhile."""
    taken = ids[:_MAX_DROPS]
    del ids[: len(taken)]
    return taken
