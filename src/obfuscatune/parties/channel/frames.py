"""One message after another over a stream: canonical fields and raw payload, limits before memory, one deadline each.

    u32 length of the fields | fields, canonical JSON | u64 length of the payload | payload

Lengths are unsigned little-endian. What a side takes depends on the state of the connection: a stranger may send a few
hundred bytes, a party that has proved who it is pieces of 4 MiB.
"""

import contextlib
import math
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from obfuscatune.errors import ConnectionClosedError, FormatError, ProtocolError, UsageError
from obfuscatune.parties.attestation.evidence import MAX_EVIDENCE_BYTES
from obfuscatune.parties.canonical import decode, encode

MAX_PIECE_BYTES = 4 * 1024**2
LONG_BYTES = 64 * 1024  # of a payload; longer ones are counted
_FIELDS, _PAYLOAD = struct.Struct("<I"), struct.Struct("<Q")
# One write of this size is bounded by the deadline; a peer that reads a byte a second gains no time with a long one.
_WRITE_BYTES = 256 * 1024


@dataclass(frozen=True)
class MessageLimits:
    """Most bytes of one message's fields and of its payload, in one state of the connection."""

    fields: int
    payload: int


HELLO = MessageLimits(1024, 0)
EVIDENCE = MessageLimits(1024, MAX_EVIDENCE_BYTES)
AUTHENTICATE = MessageLimits(4096, 0)  # an identity with an ML-KEM key is 1.9 KB
ANSWER = MessageLimits(8192, 0)
SESSION = MessageLimits(256 * 1024, MAX_PIECE_BYTES)


def encode_message(fields: Mapping[str, Any], payload: bytes, limits: MessageLimits) -> bytes:
    """Return the bytes of a message up to its payload.

    Raises:
        UsageError: it is beyond the limits, or a field has no canonical form; nothing may be sent.
    """
    data = encode(dict(fields))
    if len(data) > limits.fields or len(payload) > limits.payload:
        got = f"{len(data)} and {len(payload)} bytes"
        expected = f"at most {limits.fields} of fields and {limits.payload} of payload"
        raise UsageError("message is too long", got=got, expected=expected)
    return _FIELDS.pack(len(data)) + data + _PAYLOAD.pack(len(payload))


def read_message(
    read: Callable[[int], bytes], limits: MessageLimits, admit: Callable[[], None] = lambda: None
) -> tuple[dict[str, Any], bytes]:
    """Read one message; ``read(n)`` returns exactly n bytes, and is never asked for more than the limits allow.

    ``admit`` is called before memory is taken for a long payload.

    Raises:
        ProtocolError: a length beyond the limits, or fields that are no object in canonical form.
    """
    (length,) = _FIELDS.unpack(read(_FIELDS.size))
    if length > limits.fields:
        raise ProtocolError("fields too long", got=f"{length} bytes", expected=f"at most {limits.fields}")
    try:
        fields = decode(read(length), "message", max_bytes=limits.fields)
    except FormatError as error:
        raise ProtocolError(error.what, got=error.got, expected=error.expected) from None
    (length,) = _PAYLOAD.unpack(read(_PAYLOAD.size))
    if length > limits.payload:
        raise ProtocolError("payload too long", got=f"{length} bytes", expected=f"at most {limits.payload}")
    if length > LONG_BYTES:
        admit()
    return fields, read(length) if length else b""


class Interrupted(Exception):  # noqa: N818 - no error, and it never leaves this package
    """Somebody in this process wants the connection to end."""


class Stream:
    """One end of a connection, for one thread at a time, but for `close`.

    Every method takes a deadline, a reading of ``time.monotonic()``: a peer that trickles bytes wins no time. After any
    error the stream is closed, so that no late byte is taken for the begin of a message. When the descriptor
    ``interrupt`` becomes readable, a receive raises `Interrupted` and the stream stays open, to say why.
    """

    def __init__(self, sock: socket.socket, peer: str, *, interrupt: int | None = None) -> None:
        self.peer = peer
        self._interrupt = interrupt
        self._socket = sock
        if sock.family != socket.AF_UNIX:
            # A handshake is small messages that wait for one another: with Nagle's algorithm each costs 40 ms.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, fields: Mapping[str, Any], payload: bytes = b"", *, limits: MessageLimits, deadline: float) -> None:
        """Send one message.

        Raises:
            UsageError: beyond the limits; nothing was sent, and the stream stays open.
            ConnectionClosedError: the peer is gone, or took no byte in time.
        """
        head = encode_message(fields, payload, limits)
        # Small messages go out as one record; a large payload is not copied for the sake of its head.
        parts = (head, payload) if len(payload) > _WRITE_BYTES else (head + payload,)
        with self._closing_on_error():
            for part in parts:
                view = memoryview(part)
                while view:
                    self._wait(deadline)
                    view = view[self._socket.send(view[:_WRITE_BYTES]) :]

    def receive(
        self,
        limits: MessageLimits,
        *,
        deadline: float,
        rest: float | None = None,
        admit: Callable[[float], None] = lambda seconds: None,
    ) -> tuple[dict[str, Any], bytes]:
        """Receive one message.

        Args:
            limits: of its lengths. deadline: for all of it. rest: seconds for what follows its first bytes.
            admit: called before a long payload is read, with the seconds that it may wait; may raise TimeoutError.

        Raises:
            ProtocolError: the peer broke a rule.
            ConnectionClosedError: it closed the connection, is gone, or was too slow.
        """
        until, begun = deadline, False

        def read(size: int) -> bytes:
            nonlocal until, begun
            data = self._read(size, until)
            if not begun and rest is not None:
                until = min(deadline, time.monotonic() + rest)
            begun = True
            return data

        with self._closing_on_error():
            return read_message(read, limits, lambda: admit(max(0.0, until - time.monotonic())))

    def peer_left(self) -> bool:
        """Return whether the peer has closed its side; for a sender that has nothing to send for a while."""
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Close the connection; again and again does no harm, and a receive blocked in another thread ends."""
        with contextlib.suppress(OSError):
            # The plain socket's method: SSLSocket's own also drops the TLS object, under the feet of another thread.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
        self._socket.close()

    def _read(self, size: int, deadline: float) -> bytes:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            if time.monotonic() >= deadline:
                raise TimeoutError
            try:
                self._socket.settimeout(0)
                count = self._socket.recv_into(view)
            except (BlockingIOError, ssl.SSLWantReadError):
                self._wait_for_bytes(deadline)
                continue
            if count == 0:
                raise ConnectionClosedError("connection is closed", got="end of stream")
            view = view[count:]
        return bytes(data)

    def _wait(self, deadline: float) -> None:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        self._socket.settimeout(remaining)

    def _wait_for_bytes(self, deadline: float) -> None:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        if self._interrupt is not None:
            poll.register(self._interrupt, select.POLLIN)
        ready = poll.poll(math.ceil(max(0.0, deadline - time.monotonic()) * 1000))
        if any(descriptor == self._interrupt for descriptor, _ in ready):
            raise Interrupted

    @contextlib.contextmanager
    def _closing_on_error(self) -> Any:
        problem: ProtocolError
        try:
            yield
            return
        except Interrupted:
            raise
        except TimeoutError:
            problem = ConnectionClosedError("peer is too slow", where=self.peer)
        except ProtocolError as error:
            problem = type(error)(error.what, got=error.got, expected=error.expected, where=self.peer)
        except (OSError, ValueError) as error:  # ssl raises ValueError on a socket that another thread has closed
            got = getattr(error, "strerror", None) or type(error).__name__
            problem = ConnectionClosedError("connection is closed", got=got, where=self.peer)
        except BaseException:
            self.close()
            raise
        self.close()
        raise problem from None
