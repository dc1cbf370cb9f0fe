"""The enclave's end of a session: requests to the worker, and the checks on every reply.

The worker is not trusted to be right. A reply is used only if it has the id of the request, exactly the tensors
expected, of exactly the expected shapes and dtypes, all finite. Anything else, a timeout and a dead worker become one
:class:`~obfuscatune.errors.WorkerFault`, after which the session is closed for good, so that a late reply can never
be taken for a later one.
"""

import math
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from obfuscatune.enclave.keys.source import Secret
from obfuscatune.errors import ConnectionClosedError, ProtocolError, UsageError, WorkerFault
from obfuscatune.protocol.connection import Connection
from obfuscatune.protocol.frames import PROTOCOL_VERSION

Expected = Mapping[str, tuple[tuple[int, ...], torch.dtype]]

# What the worker can be told to forget; of each so many with one request: a header holds some thousands of values.
DROPPED = ("calls", "caches", "shared")
_MAX_DROPS = 1000


@dataclass(slots=True)
class Traffic:
    """Counts of one kind of request: calls, bytes in both directions, seconds spent waiting for replies."""

    calls: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    seconds: float = 0.0


class Session(Secret):
    """Requests to one worker over one connection. Refuses to be copied or pickled, and so does a model around it.

    Args:
        connection: connected, nothing sent yet.
        worker: how messages name the worker: its address, or ``spawned process N``.
        timeout: seconds to wait for one reply.
        process: the worker's process where this enclave started it.
    """

    def __init__(
        self, connection: Connection, *, worker: str, timeout: float, process: "subprocess.Popen[bytes] | None" = None
    ) -> None:
        self.connection, self.worker, self.process = connection, worker, process
        self.traffic: defaultdict[str, Traffic] = defaultdict(Traffic)
        self._timeout = timeout
        self._last_id = 0
        self._dropped: dict[str, list[int]] = {kind: [] for kind in DROPPED}
        self._lock = threading.RLock()
        self._ended: str | None = None
        connection.settimeout(timeout)

    def hello(self) -> dict[str, Any]:
        """Greet the worker; returns what it says of itself. Raises WorkerFault where it speaks another version."""
        reply, _ = self.request("hello", "-", {}, {}, {})
        if reply.get("version") != PROTOCOL_VERSION:
            got = ascii(reply.get("version"))[:20]
            raise self.fault("another protocol version", "-", got=got, expected=PROTOCOL_VERSION)
        return reply

    def drop(self, kind: str, number: int) -> None:
        """Let the worker forget a call, a KV cache or a shared tensor, with the next request; for finalizers too."""
        self._dropped[kind].append(number)

    def request(
        self, op: str, layer: str, header: dict[str, Any], tensors: Mapping[str, Tensor], expected: Expected | None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Send one request and return its checked reply.

        Args:
            op: name of the operation. layer: path of the layer it serves, for messages; never sent.
            header: the operation's own fields. tensors: keyed tensors by wire name.
            expected: names, shapes and dtypes of the reply's tensors; ``None`` takes whatever comes (exports).

        Raises:
            WorkerFault: naming worker, layer and call.
            UsageError: the protected model was closed before; or the request is beyond the limits of a frame, in which
                case nothing was sent and the session goes on.
        """
        with self._lock:
            if self._ended is not None:
                raise UsageError(self._ended, where=layer, hint="protect the model again, with a worker that runs")
            self._last_id += 1
            call = self._last_id
            message = {"id": call, "op": op, **header}
            dropped = {kind: taken for kind, ids in self._dropped.items() if (taken := _take(ids))}
            if dropped:
                message["drop"] = dropped
            # A worker may not make the enclave allocate more than it asked for.
            most = None if expected is None else sum(math.prod(s) * d.itemsize for s, d in expected.values())
            sent, received = self.connection.bytes_sent, self.connection.bytes_received
            started = time.perf_counter()
            try:
                self.connection.send(message, tensors)
                reply, outputs = self.connection.receive(max_payload=most)
            except TimeoutError as error:
                raise self.fault(f"no reply within {self._timeout:g} s", layer) from error
            except ConnectionClosedError as error:
                raise self.fault("the worker is gone", layer, got=self._exit_status()) from error
            except ProtocolError as error:
                raise self.fault("the reply breaks the protocol", layer, got=error.what) from error
            except UsageError:  # beyond the limits, so not a byte of it was sent
                for kind, ids in dropped.items():
                    self._dropped[kind][:0] = ids
                raise
            except BaseException:  # an interrupt between two bytes: the connection cannot be used again
                self._end("the session was interrupted in the middle of a request")
                raise
            counts = self.traffic[op]
            counts.calls += 1
            counts.seconds += time.perf_counter() - started
            counts.bytes_sent += self.connection.bytes_sent - sent
            counts.bytes_received += self.connection.bytes_received - received
            self._check(reply, outputs, expected, layer, call)
            return reply, outputs

    def _check(
        self, reply: dict[str, Any], outputs: dict[str, Tensor], expected: Expected | None, layer: str, call: int
    ) -> None:
        if reply.get("ok") is not True:
            # The worker's own words: nothing of it may steer a terminal.
            message = ascii(reply.get("message", "no message"))[:300]
            raise self.fault("the worker refused the request", layer, got=message)
        if reply.get("id") != call:
            raise self.fault("reply to another call", layer, got=ascii(reply.get("id"))[:20], expected=call)
        if expected is not None:
            if set(outputs) != set(expected):
                raise self.fault("tensors of the reply", layer, got=sorted(outputs)[:8], expected=sorted(expected))
            for name, (shape, dtype) in expected.items():
                tensor = outputs[name]
                if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                    got = f"{list(tensor.shape)} {tensor.dtype}"
                    raise self.fault(f"shape or dtype of {name}", layer, got=got, expected=f"{list(shape)} {dtype}")
        for name, tensor in outputs.items():
            # One pass in the common case: a sum is finite unless a term is not, or it overflows.
            if tensor.is_floating_point() and not math.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
                raise self.fault(
                    f"{name} is not finite", layer, hint="a faulty worker, or a training run that diverged"
                )

    def _exit_status(self) -> str | None:
        if self.process is None:
            return None
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "a closed connection, from a process that still runs"
        return f"exit status {code}" if code >= 0 else f"killed by signal {-code}"

    def fault(self, what: str, layer: str, **details: Any) -> WorkerFault:
        """End the session and return the error to raise; ``what`` was wrong with the reply of the last call."""
        fault = WorkerFault(what, worker=self.worker, layer=layer, call=self._last_id, **details)
        self._end(f"the worker's session ended by an earlier fault ({what})")
        return fault

    def _end(self, reason: str) -> None:
        self._ended = self._ended or reason
        self.connection.close()
        if self.process is not None and self.process.poll() is None:
            try:
                self.process.wait(timeout=10)  # it leaves by itself when the connection closes
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def close(self) -> None:
        """End the session; a worker that this enclave started ends with it. May be called again."""
        with self._lock:
            self._end("the protected model was closed")


def _take(ids: list[int]) -> list[int]:
    """Remove and return the first ids; a finalizer may append to the list meanwhile."""
    taken = ids[:_MAX_DROPS]
    del ids[: len(taken)]
    return taken
