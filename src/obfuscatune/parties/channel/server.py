"""The enclave's end: strangers bounded in bytes and seconds, parties known by signature, and none who shuts others out.

A connection costs a descriptor until its first byte, then a thread. Each of the three tables of places (silent,
strangers, parties) has owners who share it fairly, see `places`; quotes of the hardware are made by turns of the
sources. Who loses a place, or gets none, is told that the enclave is busy wherever there is a way to tell.

The certificate is made again once it is a minute old, so that a client's policy may be strict about the age of
evidence however long the enclave runs; the enclave's identity stays.
"""

import contextlib
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

from obfuscatune.errors import BusyError, ConnectionClosedError, ObfuscatuneError, UsageError
from obfuscatune.parties.attestation.evidence import Attester
from obfuscatune.parties.channel.address import TlsAddress
from obfuscatune.parties.channel.certificate import EnclaveCertificate, fresh_evidence, make_certificate
from obfuscatune.parties.channel.conversation import Conversation
from obfuscatune.parties.channel.faults import to_fields
from obfuscatune.parties.channel.places import TRY_AGAIN, Places, Turns
from obfuscatune.parties.channel.tls import server_context
from obfuscatune.parties.identity import Identity, PublicIdentity
from obfuscatune.protocol.hostport import source_of

logger = logging.getLogger(__name__)

Reply = tuple[dict[str, Any], bytes]
# A reply that comes in parts is a generator: it yields parts, or None where there is nothing for a while, and returns
# the last one. It is closed when the client leaves; after a None, this is noticed.
Parts = Generator[Reply | None, None, Reply]
Handler = Callable[[PublicIdentity, dict[str, Any], bytes], Reply | Parts]
MAX_SILENT = 1024  # connections that have not sent a byte
MAX_AT_ONCE = 8  # requests of one party that are worked on; its others wait
MAX_PIECES = 16  # long payloads of one party in memory, each of at most 4 MiB
_BACKLOG = 1024
_RENEWAL_SECONDS = 60.0
_CLOSING_SECONDS = 5.0
_LOOK_SECONDS = 0.02


class AttestedServer:
    """Serves parties that ``allow`` knows, each after the enclave has proved itself to it.

    Args:
        address: ``tls://HOST:PORT``; port 0 lets the system pick one, which `address` then tells.
        identity: the enclave's; only its public half goes into evidence.
        attester: the hardware.
        allow: whether a party that has proved its identity may make requests.
        handle: answers one request of a party, at once or in parts (`Parts`); called from several threads at once, for
            one party's connections too.
            Its ObfuscatuneErrors go to the party as they are, of other exceptions it learns nothing.
        timeout: seconds for the first byte; for the handshake, from then to the end of authentication; and for taking a
            reply.
        idle_timeout: seconds within which an authenticated party's next request must have begun.
        max_connections: of strangers at once, and of parties: each costs a thread.
        members: number and digest of the membership that ``allow`` goes by, for the party to compare; None: not told.

    Raises:
        AttestationError: the hardware gives no evidence.
        UsageError: not an address, or it cannot be listened at.
    """

    def __init__(
        self,
        address: str,
        *,
        identity: Identity,
        attester: Attester,
        allow: Callable[[PublicIdentity], bool],
        handle: Handler,
        timeout: float = 30.0,
        idle_timeout: float = 300.0,
        max_connections: int = 512,
        members: Callable[[], dict[str, Any] | None] = lambda: None,
    ) -> None:
        self._identity, self._attester = identity.public, attester
        self.allow, self._handle, self.members = allow, handle, members
        self.timeout, self.idle_timeout = timeout, idle_timeout
        self.strangers = Places(max_connections, newest_first=True)
        self.parties = Places(max_connections, newest_first=False)
        self._lock = threading.Lock()  # of the five below
        self._open: dict[threading.Thread, Conversation] = {}
        self._at_once: dict[str, threading.Semaphore] = {}
        self._pieces: dict[str, threading.Semaphore] = {}
        self._serving = self._closed = False
        self._attesting = Turns()  # one quote at a time: the hardware's interface is one
        self._certificate = make_certificate(self._identity, attester)
        self._context, self._made = server_context(self._certificate), time.monotonic()
        parsed = TlsAddress.parse(address)
        self._listener = parsed.listen(_BACKLOG)
        self._listener.setblocking(False)
        self.address = str(TlsAddress(parsed.host, self._listener.getsockname()[1]))

    def serve_forever(self) -> None:
        """Accept connections until `close`; whatever one of them sends, the next is served."""
        with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
            silent = Silent(selector, self.timeout)
            stack.callback(silent.close)
            with self._lock:
                if self._closed:
                    return
                self._serving = True
            stack.callback(self._listener.close)
            selector.register(self._listener, selectors.EVENT_READ)
            while not self._closed:
                for key, _ in selector.select(silent.patience()):
                    if key.fileobj is self._listener:
                        self._accept(silent)
                    elif silent.has(key.fileobj):  # it may have lost its place in this very round
                        self._begin(*silent.pop(key.fileobj))
                silent.expire()

    def _accept(self, silent: "Silent") -> None:
        try:
            accepted, peer = self._listener.accept()
        except BlockingIOError:
            return  # it gave up
        except OSError as error:
            if self._closed:
                return
            logger.warning("cannot accept a connection: %s", error.strerror)
            if self._listener.fileno() < 0:
                raise UsageError("the listener is gone", where=self.address) from None
            time.sleep(0.1)  # out of descriptors: connections that end give some back
            return
        accepted.setblocking(True)
        silent.add(accepted, source_of(peer[0]))

    def _begin(self, accepted: socket.socket, source: str) -> None:
        conversation = Conversation(self, accepted, source)
        try:
            self.strangers.enter(source, conversation)
        except BusyError:
            accepted.close()
            return
        thread = threading.Thread(target=self._serve, args=(accepted, conversation, source), daemon=True)
        with self._lock:  # a thread that `close` finds has been started
            self._open[thread] = conversation
            if self._closed:
                conversation.close()
            try:
                thread.start()
            except RuntimeError:  # the machine gives no more threads: this connection ends, and no other
                del self._open[thread]
                self.strangers.exit(source, conversation)
                accepted.close()

    def expel(self, fingerprint: str) -> None:
        """End all connections of a party at once, whatever they are doing: none gets another reply."""
        with self._lock:
            found = [conversation for conversation in self._open.values() if conversation.client == fingerprint]
        for conversation in found:
            conversation.expel()

    def drain(self, seconds: float) -> None:
        """Wait until no reply is on its way, for so many seconds at most; before `close`."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with self._lock:
                if all(conversation.idle for conversation in self._open.values()):
                    return
            time.sleep(_LOOK_SECONDS)

    def close(self) -> None:
        """Stop listening, end all connections and wait a few seconds for their threads; again does no harm."""
        with self._lock:
            self._closed = True
            pending = dict(self._open)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the selector, which closing it would not
        if not self._serving:
            self._listener.close()
        for conversation in pending.values():
            conversation.close()
        deadline = time.monotonic() + _CLOSING_SECONDS
        for thread in pending:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _serve(self, accepted: socket.socket, conversation: Conversation, source: str) -> None:
        """One connection, from TLS to its end; nothing that happens in it leaves this method."""
        try:
            conversation.run()
        except ConnectionClosedError as error:
            logger.debug("connection ended: %s", error)
        except ObfuscatuneError as error:
            logger.warning("connection refused: %s", error)
        except (OSError, ValueError) as error:  # no TLS, another version, or gone: whoever reaches the port can do it
            logger.debug("connection ended in its handshake: %s", type(error).__name__)
        except Exception as error:  # the boundary of the server
            logger.warning("connection failed: %s", type(error).__name__)
        finally:
            accepted.close()
            self.strangers.exit(source, conversation)
            with self._lock:
                self._open.pop(threading.current_thread(), None)

    # What a conversation needs

    def credentials(self, source: str) -> tuple[EnclaveCertificate, Any]:
        """Return a certificate younger than a minute and its context."""
        if time.monotonic() - self._made > _RENEWAL_SECONDS:
            with self._attesting.turn(source):
                if time.monotonic() - self._made > _RENEWAL_SECONDS:
                    certificate = make_certificate(self._identity, self._attester)
                    self._certificate, self._context = certificate, server_context(certificate)
                    self._made = time.monotonic()
        return self._certificate, self._context

    def evidence(self, source: str, tls_key: str, nonce: str) -> bytes:
        """Return fresh evidence; the sources take turns."""
        with self._attesting.turn(source):
            return fresh_evidence(self._identity, self._attester, tls_key, nonce).to_bytes()

    def pieces(self, client: PublicIdentity) -> threading.Semaphore:
        """Return the party's share of long payloads in memory."""
        with self._lock:
            return self._pieces.setdefault(client.fingerprint, threading.BoundedSemaphore(MAX_PIECES))

    def answer(self, client: PublicIdentity, fields: dict[str, Any], payload: bytes) -> Generator[Reply | None]:
        """Yield the parts of the reply to one request of a party, or what it is told of the failure."""
        with self._lock:
            turn = self._at_once.setdefault(client.fingerprint, threading.BoundedSemaphore(MAX_AT_ONCE))
        try:
            if not turn.acquire(timeout=self.timeout):
                raise BusyError("too many requests of this party at once", expected=MAX_AT_ONCE, hint=TRY_AGAIN)
            try:
                found = self._handle(client, fields, payload)
                reply, data = found if isinstance(found, tuple) else (yield from _marked(found))
            finally:
                turn.release()
        except Exception as error:  # whatever one request provokes, the next one is served
            logger.warning("request failed: %s", error if isinstance(error, ObfuscatuneError) else type(error).__name__)
            yield to_fields(error), b""
        else:
            yield {"fields": reply}, data


def _marked(parts: Parts) -> Parts:
    """Yield the parts but for the last, each marked as one that others follow; return the last."""
    with contextlib.closing(parts):
        while True:
            try:
                part = next(parts)
            except StopIteration as end:
                last: Reply = end.value
                return last
            yield None if part is None else ({"fields": part[0], "more": 1}, part[1])


class Silent:
    """Connections that have not sent a byte: in a selector, for one thread. They cost no thread of their own."""

    def __init__(self, selector: selectors.BaseSelector, seconds: float) -> None:
        self._selector, self._seconds = selector, seconds
        self._places = Places(MAX_SILENT, newest_first=True)
        self._waiting: dict[Any, _Silence] = {}  # the oldest first

    def add(self, accepted: socket.socket, source: str) -> None:
        """Wait for the first byte of a connection; where there are too many, another one ends."""
        silence = _Silence(self, accepted, source, time.monotonic() + self._seconds)
        self._waiting[accepted] = silence
        self._selector.register(accepted, selectors.EVENT_READ)
        self._places.enter(source, silence)

    def has(self, accepted: Any) -> bool:
        """Return whether it is one of them."""
        return accepted in self._waiting

    def pop(self, accepted: Any) -> tuple[socket.socket, str]:
        """Return a connection that has something to say, and its source."""
        silence = self._waiting.pop(accepted)
        self._selector.unregister(accepted)
        self._places.exit(silence.source, silence)
        return silence.accepted, silence.source

    def end(self, accepted: socket.socket) -> None:
        """End a connection."""
        self.pop(accepted)[0].close()

    def patience(self) -> float | None:
        """Return the seconds until the oldest must have spoken; None where there is none."""
        oldest = next(iter(self._waiting.values()), None)
        return None if oldest is None else max(0.0, oldest.until - time.monotonic())

    def expire(self) -> None:
        """End those whose time is over."""
        now = time.monotonic()
        for silence in [one for one in self._waiting.values() if one.until <= now]:
            self.end(silence.accepted)

    def close(self) -> None:
        """End all."""
        for accepted in list(self._waiting):
            self.end(accepted)


class _Silence:
    """One of them, as the holder of its place."""

    idle = True

    def __init__(self, silent: Silent, accepted: socket.socket, source: str, until: float) -> None:
        self._silent, self.accepted, self.source, self.until = silent, accepted, source, until

    def leave(self) -> None:
        self._silent.end(self.accepted)
