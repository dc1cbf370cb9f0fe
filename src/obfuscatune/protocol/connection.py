"""One frame after another over a connected stream socket, with no copy besides the kernel's.

Timeouts are the kernel's (SO_RCVTIMEO, SO_SNDTIMEO) and not Python's: a blocking socket reads a whole tensor in one
system call (MSG_WAITALL), where Python's timeouts take a poll and a read for each buffer full.
"""

import contextlib
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from obfuscatune.errors import ConnectionClosedError, ProtocolError, UsageError
from obfuscatune.protocol.frames import PREFIX, TensorSpec, check_bools, decode_header, decode_prefix, encode_head
from obfuscatune.protocol.limits import DEFAULT_LIMITS, Limits

NO_TENSORS: Mapping[str, torch.Tensor] = MappingProxyType({})
# Holds a hidden state of 512 tokens whole (1.5 MB): a round trip of it then takes about 5 % less than with 208 KiB.
_UNIX_BUFFER_BYTES = 2 * 1024**2
_MAX_BUFFERS = 1024  # of one system call, on Linux and macOS
# A host that vanishes says no goodbye. Its kernel is asked after silence, and the connection ends without an answer.
_TCP_OPTIONS = {
    "TCP_NODELAY": 1,
    "TCP_KEEPIDLE": 15,  # seconds of silence before the first question
    "TCP_KEEPINTVL": 15,  # seconds between questions
    "TCP_USER_TIMEOUT": 60_000,  # milliseconds without an answer, or with sent bytes not taken, before the end
}


class Connection:
    """One end of a session. For one thread at a time, but for `close`, which wakes a `receive` blocked in another.

    Args:
        sock: a connected unix or TCP stream socket; the connection owns it from here on.
        limits: bounds of every frame in both directions.
        peer: how errors name the other side, for instance its address.
        tap: called with "out" or "in" and each run of bytes that crossed, in order: recordings for the wire test.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        limits: Limits = DEFAULT_LIMITS,
        peer: str,
        tap: Callable[[str, bytes], None] | None = None,
    ) -> None:
        self.limits, self.peer = limits, peer
        self.bytes_sent = self.bytes_received = 0
        self._sock, self._tap = sock, tap
        if sock.family == socket.AF_UNIX:
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                sock.setsockopt(socket.SOL_SOCKET, option, _UNIX_BUFFER_BYTES)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _TCP_OPTIONS.items():
                if hasattr(socket, name):  # not every system has all of them
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        sock.settimeout(None)
        self.settimeout(None)

    def settimeout(self, seconds: float | None) -> None:
        """Bound every wait for the peer: for each part (prefix, header, payload) of a frame; None waits for ever."""
        if seconds is not None and not 0 < seconds < 2**31:
            raise UsageError("wrong timeout", got=seconds, expected="seconds above 0, or None")
        # The kernel reads 0 as "for ever", so less than a microsecond becomes one.
        microseconds = 0 if seconds is None else max(1, round(seconds * 1e6))
        value = struct.pack("@ll", *divmod(microseconds, 1_000_000))
        try:
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                self._sock.setsockopt(socket.SOL_SOCKET, option, value)
        except OSError as error:
            raise self._closed(error.strerror) from None
        self._timeout = seconds

    def send(self, fields: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] = NO_TENSORS) -> int:
        """Send one frame and return its size in bytes.

        Contiguous CPU tensors are sent from where they lie; others are copied there first. Autograd is not told.

        Raises:
            UsageError: the frame breaks a rule or a limit (`encode_head`); nothing was sent, the connection stays open.
            TimeoutError: the builtin one: the peer took no byte for the timeout; the connection is closed.
            ConnectionClosedError: the peer is gone; the connection is closed.
        """
        specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        head, payload_length = encode_head(fields, specs, self.limits)
        buffers = [head, *(_array(tensor) for tensor in tensors.values() if tensor.numel())]
        try:
            self._move("out", buffers, len(head) + payload_length)
        except BaseException:
            self.close()  # what follows a part of a frame would be read as its rest
            raise
        return len(head) + payload_length

    def receive(self, *, max_payload: int | None = None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Receive one frame: its fields, and its tensors, each in CPU memory of its own.

        Only the frame's own rules are checked here, not what its fields and tensors mean, nor that numbers are finite.
        A payload of more than ``max_payload`` bytes (None: the limits') is refused before memory is asked for.

        Raises:
            ProtocolError: the peer broke a rule; the connection is closed.
            ConnectionClosedError: the peer closed it or is gone.
            TimeoutError: the builtin one. Before the first byte of a frame the connection stays open, for a server that
                only looks up from waiting; whoever gives up waiting for a reply must `close`. Within a frame it is
                closed, so that a late rest is never taken for the next frame.
        """
        before = self.bytes_received
        try:
            return self._receive(max_payload)
        except BaseException as error:
            if not isinstance(error, TimeoutError) or self.bytes_received != before:
                self.close()
            if type(error) is ProtocolError:  # the codec knows the rule, this knows the peer
                where = self.peer if error.where is None else f"{self.peer}, tensor {error.where}"
                raise ProtocolError(error.what, got=error.got, expected=error.expected, where=where) from None
            raise

    def close(self) -> None:
        """Close the connection; again and again does no harm."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # close alone would leave another thread in its receive
        self._sock.close()

    def _receive(self, max_payload: int | None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        prefix = bytearray(PREFIX.size)
        self._move("in", [prefix], PREFIX.size)
        header_length, payload_length = decode_prefix(prefix, self.limits)
        if max_payload is not None and payload_length > max_payload:
            raise ProtocolError("payload too long", got=payload_length, expected=f"at most {max_payload}")
        header = bytearray(header_length)
        self._move("in", [header], header_length)
        fields, specs = decode_header(header, payload_length, self.limits)
        try:
            tensors = {name: torch.empty(shape, dtype=dtype, device="cpu") for name, dtype, shape in specs}
        except RuntimeError:  # torch's out of memory: it ends this session and not the server
            raise ProtocolError("payload does not fit in memory", got=f"{payload_length} bytes") from None
        arrays = [_array(tensor) for tensor in tensors.values() if tensor.numel()]
        self._move("in", arrays, payload_length)
        for array in arrays:
            if array.dtype == np.bool_:
                check_bools(array.view(np.uint8))
        return fields, tensors

    def _move(self, direction: str, buffers: Sequence[Any], size: int) -> None:
        """Send or fill all of ``buffers``, none of them empty, ``size`` bytes in total."""
        if size == 0:
            return
        start = time.monotonic()
        moved = self._step(direction, buffers[:_MAX_BUFFERS])
        if moved == size and self._tap is None:
            return
        views = [np.frombuffer(buffer, np.uint8).data for buffer in buffers]
        while True:
            done, views = _split(views, moved)
            if self._tap is not None:
                self._tap(direction, b"".join(done))
            size -= moved
            if size == 0:
                return
            # A peer that trickles bytes restarts the kernel's clock with each of them, but not this one.
            if self._timeout is not None and time.monotonic() - start > self._timeout:
                raise self._late()
            moved = self._step(direction, views[:_MAX_BUFFERS])

    def _step(self, direction: str, buffers: Sequence[Any]) -> int:
        try:
            if direction == "out":
                moved = self._sock.sendmsg(buffers)
                self.bytes_sent += moved
                return moved
            moved = self._sock.recvmsg_into(buffers, 0, socket.MSG_WAITALL)[0]
        except BlockingIOError:
            raise self._late() from None
        except OSError as error:
            raise self._closed(error.strerror) from None
        if moved == 0:
            raise self._closed("end of stream")
        self.bytes_received += moved
        return moved

    def _late(self) -> TimeoutError:
        return TimeoutError(f"{self.peer} was silent for {self._timeout} s")

    def _closed(self, got: str | None) -> ConnectionClosedError:
        return ConnectionClosedError("connection is closed", got=got, where=self.peer)


def _array(tensor: torch.Tensor) -> "np.ndarray[Any, Any]":
    """The tensor's elements as the wire has them; shares the memory of a contiguous CPU tensor."""
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy()  # numpy has no bfloat16


def _split(views: list[memoryview], count: int) -> tuple[list[memoryview], list[memoryview]]:
    """The first ``count`` bytes of ``views``, and the rest."""
    for index, view in enumerate(views):
        if count < len(view):
            return [*views[:index], view[:count]], [view[count:], *views[index + 1 :]]
        count -= len(view)
    return views, []
