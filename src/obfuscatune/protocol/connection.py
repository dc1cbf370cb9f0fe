"""One frame after another over a connected stream socket, with no copy besides the kernel's, and OpenSSL's under TLS.

Where several requests are under way a peer may be unable to take the next one until its replies are read. `send` then
reads meanwhile, by a function that its caller gives it, so that the two never wait for each other.
"""

import contextlib
import socket
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch

from obfuscatune.errors import ConnectionClosedError, ProtocolError, UsageError
from obfuscatune.protocol.frames import PREFIX, TensorSpec, check_bools, decode_header, decode_prefix, encode_head
from obfuscatune.protocol.limits import DEFAULT_LIMITS, Limits
from obfuscatune.protocol.stream import PlainStream, stream_of

NO_TENSORS: Mapping[str, torch.Tensor] = MappingProxyType({})
_GLANCE_SECONDS = 0.05  # how long `send` waits before it looks again whether somebody else reads


class Frame(NamedTuple):
    """A frame that was received: its fields, its tensors, each in CPU memory of its own, and its size in bytes."""

    fields: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    size: int

    def __repr__(self) -> str:
        """Its size alone: what it holds are activations."""
        return f"Frame({self.size} bytes)"


class Connection:
    """One end of a session. One thread may send while another one receives; `close` is for any thread, at any time.

    Args:
        sock: a connected unix or TCP stream socket, or an `ssl.SSLSocket` after its handshake; the connection owns it
            from here on.
        limits: bounds of every frame in both directions.
        peer: how errors name the other side, for instance its address.
        tap: called with "out" or "in" and each run of bytes that crossed, in order and before TLS: recordings for the
            wire test.

    Attribute ``pin_memory``: whether tensors come in page-locked memory, from which a GPU copies without a wait.
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
        self.pin_memory = False
        self._stream, self._tap = stream_of(sock), tap
        self._timeout: float | None = None
        self._frame: Generator[list[Any], None, Frame] | None = None  # that is coming in
        self._missing: list[Any] = []  # its buffers that are still to be filled
        self._begun = False  # whether a byte of it has come

    @property
    def shares_memory(self) -> bool:
        """Whether a descriptor can be passed: over a unix socket of which no recording is made."""
        return isinstance(self._stream, PlainStream) and self._stream.passes_descriptors and self._tap is None

    def expect_descriptor(self) -> None:
        """Keep a descriptor that comes with a later frame; see `take_descriptor`."""
        if isinstance(self._stream, PlainStream):
            self._stream.expect_descriptor()

    def take_descriptor(self) -> int | None:
        """Return the descriptor that came, which is the caller's to close; None where none has."""
        return self._stream.take_descriptor() if isinstance(self._stream, PlainStream) else None

    def settimeout(self, seconds: float | None) -> None:
        """Bound the wait for a frame, from when it is asked for to its end, and for one to be taken; None: for ever."""
        if seconds is not None and not 0 < seconds < 2**31:
            raise UsageError("wrong timeout", got=seconds, expected="seconds above 0, or None")
        try:
            self._stream.bound(seconds)
        except OSError as error:
            raise self._closed(error.strerror) from None
        self._timeout = seconds

    def send(
        self,
        fields: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor] = NO_TENSORS,
        *,
        meanwhile: Callable[[], bool] | None = None,
        descriptor: int | None = None,
    ) -> int:
        """Send one frame and return its size in bytes.

        Contiguous CPU tensors are sent from where they lie; others are copied there first. Autograd is not told.

        Args:
            meanwhile: called while the peer takes no byte, when it has sent some; it reads them, by `receive_part`, and
                returns False where somebody else reads.
            descriptor: passed to the peer with the frame, where `shares_memory`.

        Raises:
            UsageError: the frame breaks a rule or a limit (`encode_head`); nothing was sent, the connection stays open.
            TimeoutError: the builtin one: the peer did not take it within the timeout; the connection is closed.
            ConnectionClosedError: the peer is gone; the connection is closed.
        """
        specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        head, payload_length = encode_head(fields, specs, self.limits)
        buffers = [head, *(_array(tensor) for tensor in tensors.values() if tensor.numel())]
        if descriptor is not None and isinstance(self._stream, PlainStream):
            self._stream.attach(descriptor)
        try:
            self._send(buffers, len(head) + payload_length, meanwhile)
        except BaseException:
            self.close()  # what follows a part of a frame would be read as its rest
            raise
        return len(head) + payload_length

    def receive(self, *, max_payload: int | None = None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Receive one frame: its fields, and its tensors; see `receive_frame`."""
        return self.receive_frame(max_payload=max_payload)[:2]

    def receive_frame(self, *, max_payload: int | None = None) -> Frame:
        """Receive one frame, or the rest of the one that `receive_part` has begun.

        Only the frame's own rules are checked here, not what its fields and tensors mean, nor that numbers are finite.
        A payload of more than ``max_payload`` bytes (None: the limits') is refused before memory is asked for.

        Raises:
            ProtocolError: the peer broke a rule; the connection is closed.
            ConnectionClosedError: the peer closed it or is gone.
            TimeoutError: the builtin one. Before the first byte of a frame the connection stays open, for a server that
                only looks up from waiting; whoever gives up waiting for a reply must `close`. Within a frame it is
                closed, so that a late rest is never taken for the next frame.
        """
        frame = self._receive(max_payload, wait=True)
        if frame is None:
            raise RuntimeError("a receive that waits returned without a frame")
        return frame

    def receive_part(self, *, max_payload: int | None = None) -> Frame | None:
        """Receive what has come of a frame, without a wait; return the frame once it is whole. Raises as above."""
        return self._receive(max_payload, wait=False)

    def close(self) -> None:
        """Close the connection; again and again does no harm."""
        self._stream.close()

    # out

    def _send(self, buffers: Sequence[Any], size: int, meanwhile: Callable[[], bool] | None) -> None:
        start = time.monotonic()
        moved = self._step_out(buffers, wait=meanwhile is None)
        if moved == size and self._tap is None:
            return
        views = _views(buffers)
        while True:
            done, views = _split(views, moved)
            if self._tap is not None and done:
                self._tap("out", b"".join(done))
            size -= moved
            if size == 0:
                return
            # A peer that trickles bytes restarts the kernel's clock with each of them, but not this one.
            self._check_time(start)
            if meanwhile is not None and moved == 0:
                self._wait_to_send(start, meanwhile)
            moved = self._step_out(views, wait=meanwhile is None)

    def _wait_to_send(self, start: float, meanwhile: Callable[[], bool]) -> None:
        """Wait until bytes can be sent, and read meanwhile."""
        reading = True
        while True:
            has_come, can_send = self._stream.wait(read=reading, seconds=_GLANCE_SECONDS)
            if can_send:
                return
            reading = meanwhile() if has_come else True
            self._check_time(start)

    def _step_out(self, buffers: Sequence[Any], *, wait: bool) -> int:
        try:
            moved = self._stream.send_some(buffers, wait=wait) or 0
        except BlockingIOError:
            raise self._late() from None
        except OSError as error:
            raise self._closed(error.strerror) from None
        self.bytes_sent += moved
        return moved

    # in

    def _receive(self, max_payload: int | None, *, wait: bool) -> Frame | None:
        if self._frame is None:
            self._frame, self._missing, self._begun = self._frame_of(max_payload), [], False
        try:
            frame = self._fill(self._frame, wait)
        except BaseException as error:
            self._frame = None
            if isinstance(error, TimeoutError) and not self._begun:
                raise
            self.close()
            if type(error) is ProtocolError:  # the codec knows the rule, this knows the peer
                where = self.peer if error.where is None else f"{self.peer}, tensor {error.where}"
                raise ProtocolError(error.what, got=error.got, expected=error.expected, where=where) from None
            raise
        if frame is not None:
            self._frame = None
        return frame

    def _frame_of(self, max_payload: int | None) -> Generator[list[Any], None, Frame]:
        """The parts of a frame, each as the buffers to be filled with it; returns the frame."""
        prefix = bytearray(PREFIX.size)
        yield [prefix]
        header_length, payload_length = decode_prefix(prefix, self.limits)
        if max_payload is not None and payload_length > max_payload:
            raise ProtocolError("payload too long", got=payload_length, expected=f"at most {max_payload}")
        header = bytearray(header_length)
        if header:
            yield [header]
        fields, specs = decode_header(header, payload_length, self.limits)
        try:
            pinned = self.pin_memory
            tensors = {n: torch.empty(shape, dtype=dtype, device="cpu", pin_memory=pinned) for n, dtype, shape in specs}
        except RuntimeError:  # torch's out of memory: it ends this session and not the server
            raise ProtocolError("payload does not fit in memory", got=f"{payload_length} bytes") from None
        arrays = [_array(tensor) for tensor in tensors.values() if tensor.numel()]
        if arrays:
            yield arrays
        for array in arrays:
            if array.dtype == np.bool_:
                check_bools(array.view(np.uint8))
        return Frame(fields, tensors, PREFIX.size + header_length + payload_length)

    def _fill(self, frame: Generator[list[Any], None, Frame], wait: bool) -> Frame | None:
        """Go on with the frame that is coming in; return it when it is whole, None where its rest has not come."""
        start, shortened = time.monotonic(), False
        try:
            while True:
                while not self._missing:
                    self._missing = next(frame)
                if self._begun and wait and self._timeout is not None:
                    spent = self._check_time(start)
                    if spent > self._timeout / 8:  # the kernel's clock starts anew with every step
                        self._stream.bound(self._timeout - spent)
                        shortened = True
                moved = self._step_in(self._missing, wait=wait)
                if moved == 0:
                    return None
                self._begun = True
                if moved == sum(map(_nbytes, self._missing)) and self._tap is None:
                    self._missing = []
                    continue
                done, self._missing = _split(_views(self._missing), moved)
                if self._tap is not None:
                    self._tap("in", b"".join(done))
        except StopIteration as end:
            whole: Frame = end.value
            return whole
        finally:
            if shortened:
                with contextlib.suppress(OSError):  # it may be closed
                    self._stream.bound(self._timeout)

    def _step_in(self, buffers: Sequence[Any], *, wait: bool) -> int:
        try:
            moved = self._stream.receive_some(buffers, wait=wait)
        except BlockingIOError:
            raise self._late() from None
        except OSError as error:
            raise self._closed(error.strerror) from None
        if moved == 0:
            raise self._closed("end of stream")
        self.bytes_received += moved or 0
        return moved or 0

    # faults

    def _check_time(self, start: float) -> float:
        """Return the seconds since ``start``; raises TimeoutError beyond the timeout."""
        spent = time.monotonic() - start
        if self._timeout is not None and spent >= self._timeout:
            raise self._late()
        return spent

    def _late(self) -> TimeoutError:
        return TimeoutError(f"{self.peer} was silent for {self._timeout} s")

    def _closed(self, got: str | None) -> ConnectionClosedError:
        return ConnectionClosedError("connection is closed", got=got, where=self.peer)


def _array(tensor: torch.Tensor) -> "np.ndarray[Any, Any]":
    """The tensor's elements as the wire has them; shares the memory of a contiguous CPU tensor."""
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy()  # numpy has no bfloat16


def _nbytes(buffer: Any) -> int:
    return int(buffer.nbytes) if hasattr(buffer, "nbytes") else len(buffer)


def _views(buffers: Sequence[Any]) -> list[memoryview]:
    return [np.frombuffer(buffer, np.uint8).data for buffer in buffers]


def _split(views: list[memoryview], count: int) -> tuple[list[memoryview], list[memoryview]]:
    """The first ``count`` bytes of ``views``, and the rest."""
    for index, view in enumerate(views):
        if count < len(view):
            return [*views[:index], view[:count]], [view[count:], *views[index + 1 :]]
        count -= len(view)
    return views, []
