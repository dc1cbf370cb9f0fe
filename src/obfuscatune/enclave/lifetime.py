"""What a session with a worker lives by: its connection, perhaps the worker's process, and the bounds of its waits.

Whatever goes wrong ends it for good, so that a late reply can never be taken for a later one. A session belongs to the
process that began it; the copy in a forked one is refused and leaves the connection alone.
"""

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from obfuscatune.enclave.keys.source import Secret
from obfuscatune.errors import ConnectionClosedError, ProtocolError, UsageError, WorkerFault
from obfuscatune.protocol.connection import Connection

ENDING_SECONDS = 10.0  # for a spawned worker to leave by itself
_CLOSED = "the protected model was closed"
_LEAST_SECONDS = 0.001  # beyond a deadline: what has come is still read


class Lifetime(Secret):
    """Base of a session: how long it waits, and how it ends. Refuses to be copied or pickled.

    Args:
        connection: connected, nothing sent yet.
        worker: how messages name the worker: its address, or ``spawned process N``.
        timeout: seconds to wait for one reply.
        process: the worker's process where this enclave started it.
    """

    def __init__(
        self, connection: Connection, *, worker: str, timeout: float, process: "subprocess.Popen[bytes] | None"
    ) -> None:
        self.connection, self.worker, self.process = connection, worker, process
        self._timeout = timeout
        self._deadline: float | None = None
        self._last_id = 0  # of the request that was sent last
        self._ended: str | None = None
        self._left_at: float | None = None  # when the connection was closed
        self._process_id = os.getpid()
        connection.settimeout(timeout)

    @property
    def has_ended(self) -> bool:
        """Whether it was closed, or ended by a fault."""
        return self._ended is not None

    @property
    def timeout(self) -> float:
        """Seconds to wait for one reply."""
        return self._timeout

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

    def is_copy(self) -> bool:
        """Whether this is the copy in a process that was forked: the connection is not its own."""
        return os.getpid() != self._process_id

    def refuse_ended(self, layer: str) -> None:
        """Raise UsageError where the session has ended, or is another process's."""
        if self.is_copy():
            hint = "protect the model in the process that runs it; the session of the first process goes on"
            raise UsageError("a protected model in a process that was forked", where=layer, hint=hint)
        if self._ended is not None:
            hint = (
                "load the model again and protect that, with a worker that runs; an adapter in the enclave can be saved"
            )
            raise UsageError(self._ended, where=layer, hint=hint)

    def _break(self, error: BaseException, layer: str, call: int) -> None:
        """End the session after an error on the connection, and raise the one that tells it; or return, to raise it.

        Args:
            layer, call: of the request that was sent, or whose reply was awaited.
        """
        if isinstance(error, ConnectionClosedError):
            self.refuse_ended(layer)  # closed here, by another thread
            status = self._exit_status()
            if status == "exit status 2" and self._last_id <= 1:
                self._end("the worker has not started")
                raise UsageError("the worker that was started here refuses its options", hint="it says why, above")
            raise self.fault("the worker is gone", layer, call=call, got=status) from error
        if isinstance(error, TimeoutError):
            raise self.fault(f"no reply within {self._timeout:g} s", layer, call=call) from error
        if isinstance(error, ProtocolError):
            raise self.fault("the reply breaks the protocol", layer, call=call, got=error.what) from error
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

    def leave(self, reason: str = _CLOSED) -> None:
        """End the session without waiting for the worker's process, which `close` does."""
        self._ended = self._ended or reason
        if not self.is_copy():  # to close the connection would end it for the first process too
            self._left_at = self._left_at or time.monotonic()
            self.connection.close()

    def _end(self, reason: str) -> None:
        self.leave(reason)
        if self._left_at is not None and self.process is not None and self.process.poll() is None:
            left = self._left_at + ENDING_SECONDS - time.monotonic()
            try:
                self.process.wait(timeout=max(_LEAST_SECONDS, left))  # it goes by itself when the connection closes
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def close(self) -> None:
        """End the session; a worker that this enclave started ends with it. May be called again, by any thread.

        Requests that are under way in other threads end with an error.
        """
        self._end(_CLOSED)


def close_all(sessions: Iterable[Lifetime]) -> None:
    """End sessions. Processes that do not go by themselves are waited for `ENDING_SECONDS`, all of them together."""
    ending = list(sessions)
    for session in ending:
        session.leave()
    for session in ending:
        session.close()
