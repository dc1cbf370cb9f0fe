"""One connection at the enclave's end: TLS, the nonce round, the party's signature, then its requests one by one."""

import contextlib
import functools
import os
import socket
import threading
import time
from collections.abc import Generator, Iterator
from typing import Any, Protocol

from obfuscatune.errors import (
    BusyError,
    ConnectionClosedError,
    ConsentError,
    ObfuscatuneError,
    ProtocolError,
    UsageError,
)
from obfuscatune.parties.channel import frames, handshake
from obfuscatune.parties.channel.certificate import EnclaveCertificate
from obfuscatune.parties.channel.faults import to_fields
from obfuscatune.parties.channel.places import TRY_AGAIN, Places
from obfuscatune.parties.channel.tls import check_protocol
from obfuscatune.parties.identity import PublicIdentity

# Of a request that has begun: 4 MiB within it are 0.6 Mbit/s. Without it, a party could keep pieces in memory for ever.
MESSAGE_SECONDS = 60.0


class Host(Protocol):
    """What a conversation needs of its server."""

    timeout: float
    idle_timeout: float
    strangers: Places
    parties: Places

    def credentials(self, source: str) -> tuple[EnclaveCertificate, Any]:
        """Return certificate and TLS context."""
        ...

    def evidence(self, source: str, tls_key: str, nonce: str) -> bytes:
        """Return fresh evidence."""
        ...

    def allow(self, client: PublicIdentity) -> bool:
        """Return whether a party may come in."""
        ...

    def members(self) -> dict[str, Any] | None:
        """Return number and digest of the membership that `allow` goes by."""
        ...

    def pieces(self, client: PublicIdentity) -> threading.Semaphore:
        """Return the party's share of long payloads in memory."""
        ...

    def answer(
        self, client: PublicIdentity, fields: dict[str, Any], payload: bytes
    ) -> Generator[tuple[dict[str, Any], bytes] | None]:
        """Yield the parts of the reply to one request; None where there is nothing for a while."""
        ...


class Conversation:
    """One connection, in a thread of its own; it holds a place among the strangers and later among the parties."""

    def __init__(self, host: Host, accepted: socket.socket, source: str) -> None:
        self._host, self._source = host, source
        self._lock = threading.Lock()  # of the four below
        self._socket = accepted
        self._interrupt: int | None = None  # descriptor that ends what it waits for
        self._leaving = self._expelled = False
        self._next: int | None = None  # least id of the next request, once the party may make some
        self.idle = True
        self.client: str | None = None  # fingerprint of the party, once it has proved who it is
        self._thread: threading.Thread | None = None
        self._resigned = False

    def expel(self) -> None:
        """End it at once, since its party may not be here any more: told so where it waits, cut where it is served.

        Where this very connection has asked for it, it gets the reply to that.
        """
        if threading.current_thread() is self._thread:
            self._resigned = True
            return
        with self._lock:
            self._leaving = self._expelled = True
            if self._interrupt is not None and self.idle:
                os.eventfd_write(self._interrupt, 1)
            else:
                self._shut()

    def leave(self) -> None:
        """Let it end: it waits for nothing any more, and its peer is told that the enclave is busy."""
        with self._lock:
            self._leaving = True
            if self._interrupt is not None:
                os.eventfd_write(self._interrupt, 1)
            else:  # within TLS's handshake nothing can be told
                self._shut()

    def close(self) -> None:
        """End it at once."""
        with self._lock:
            self._shut()

    def _shut(self) -> None:
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def run(self) -> None:
        """Converse until one of the two ends it; closes the socket.

        Raises:
            ObfuscatuneError, OSError: how it ended.
        """
        host, self._thread = self._host, threading.current_thread()
        deadline = time.monotonic() + host.timeout
        certificate, context = host.credentials(self._source)
        self._socket.settimeout(host.timeout)
        with context.wrap_socket(self._socket, server_side=True, do_handshake_on_connect=False) as secured:
            with self._lock:  # wrapping has moved the descriptor
                self._socket = secured
                if self._leaving:
                    return
            secured.do_handshake()
            check_protocol(secured, "client")
            with self._interruption() as interrupt:
                stream = frames.Stream(secured, "client", interrupt=interrupt)
                try:
                    self._serve(stream, certificate, deadline)
                except frames.Interrupted:
                    error: ObfuscatuneError
                    error = BusyError("the enclave is busy and gives this connection's place away", hint=TRY_AGAIN)
                    if self._expelled:
                        error = _not_a_member(self.client)
                    # In place of the next reply.
                    self._send(stream, ({} if self._next is None else {"id": self._next}) | to_fields(error))

    @contextlib.contextmanager
    def _interruption(self) -> Iterator[int]:
        interrupt = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        with self._lock:
            self._interrupt = interrupt
            if self._leaving:
                os.eventfd_write(interrupt, 1)
        try:
            yield interrupt
        finally:
            with self._lock:
                self._interrupt = None
            os.close(interrupt)

    def _serve(self, stream: frames.Stream, certificate: EnclaveCertificate, deadline: float) -> None:
        host = self._host
        try:
            client = self._greet(stream, certificate, deadline)
            self.client = client.fingerprint
            host.parties.enter(client.fingerprint, self)
        except ConnectionClosedError:
            raise
        except ObfuscatuneError as error:
            with contextlib.suppress(ConnectionClosedError):  # as the stream is after bytes that are no message
                self._send(stream, to_fields(error))
            raise
        try:
            host.strangers.exit(self._source, self)
            self._send(stream, handshake.accepted(host.members()))
            self._answer_all(stream, client)
        finally:
            host.parties.exit(client.fingerprint, self)

    def _greet(self, stream: frames.Stream, certificate: EnclaveCertificate, deadline: float) -> PublicIdentity:
        host = self._host
        fields, _ = stream.receive(frames.HELLO, deadline=deadline)
        nonce, own_nonce = handshake.read_hello(fields), os.urandom(32).hex()
        evidence = host.evidence(self._source, certificate.tls_key, nonce)
        stream.send(handshake.evidence_reply(own_nonce), evidence, limits=frames.EVIDENCE, deadline=deadline)
        fields, _ = stream.receive(frames.AUTHENTICATE, deadline=deadline)
        transcript = handshake.Transcript(
            handshake.digest(certificate.der), nonce, own_nonce, handshake.digest(evidence)
        )
        # The signature first: only who holds an identity's key may learn whether it is known here.
        client = handshake.read_authenticate(fields, transcript)
        if host.allow(client) is not True:
            raise _not_a_member(client.fingerprint)
        return client

    def _answer_all(self, stream: frames.Stream, client: PublicIdentity) -> None:
        pieces, self._next = self._host.pieces(client), 1
        while True:
            with contextlib.ExitStack() as held:
                admit = functools.partial(_admit, pieces, held)
                idle_until = time.monotonic() + self._host.idle_timeout
                message, payload = stream.receive(
                    frames.SESSION, deadline=idle_until, rest=MESSAGE_SECONDS, admit=admit
                )
                number, fields = message.get("id"), message.get("fields")
                if set(message) != {"fields", "id"} or type(number) is not int or not isinstance(fields, dict):
                    raise ProtocolError("not a request", expected="fields and id")
                if number < self._next:
                    raise ProtocolError("id of a request does not increase", expected=f"at least {self._next}")
                self._next, self.idle = number + 1, False
                # Before it is done, since a removal does not wait for it; before each part, as one may come.
                self._require_member(stream, number, client)
                with contextlib.closing(self._host.answer(client, fields, payload)) as parts:
                    self._reply(stream, number, client, parts)
                if self._resigned:
                    return
                self.idle = True

    def _reply(
        self,
        stream: frames.Stream,
        number: int,
        client: PublicIdentity,
        parts: Generator[tuple[dict[str, Any], bytes] | None],
    ) -> None:
        """Send the parts of a reply as they come. Whoever makes them makes no more once the client has left.

        Backpressure: the next part is asked for when the client has taken the one before, within the host's timeout.
        """
        for part in parts:
            if part is None:
                if stream.peer_left():
                    raise ConnectionClosedError("the client has left", where=stream.peer)
                continue
            if not self._resigned:
                self._require_member(stream, number, client)
            reply, data = part
            try:
                self._send(stream, {"id": number, **reply}, data)
            except UsageError:  # nothing of it was sent, and this one always fits
                error = ObfuscatuneError("the reply is beyond the limits of a message")
                self._send(stream, {"id": number, **to_fields(error)})
                return

    def _require_member(self, stream: frames.Stream, number: int, client: PublicIdentity) -> None:
        if self._host.allow(client) is not True:
            error = _not_a_member(client.fingerprint)
            self._send(stream, {"id": number, **to_fields(error)})
            raise error

    def _send(self, stream: frames.Stream, fields: dict[str, Any], payload: bytes = b"") -> None:
        limits = frames.SESSION if "id" in fields else frames.ANSWER
        stream.send(fields, payload, limits=limits, deadline=time.monotonic() + self._host.timeout)


def _not_a_member(fingerprint: str | None) -> ConsentError:
    hint = "its members admit others (obfuscatune party admit); at its start the operator names the first"
    return ConsentError("client is not known to this enclave", got=fingerprint, hint=hint)


def _admit(pieces: threading.Semaphore, held: contextlib.ExitStack, seconds: float) -> None:
    """Wait for one of the party's long payloads, which ``held`` gives back; raises TimeoutError."""
    if not pieces.acquire(timeout=seconds):
        raise TimeoutError
    held.callback(pieces.release)
