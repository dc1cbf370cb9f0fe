"""The enclave's end: a thread for each connection, strangers bounded in bytes and seconds, parties known by signature.

The certificate is made again once it is a minute old, so that a client's policy may be strict about the age of
evidence however long the enclave runs; the enclave's identity stays.
"""

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from obfuscatune.errors import ConnectionClosedError, ConsentError, ObfuscatuneError, ProtocolError, UsageError
from obfuscatune.parties.attestation.evidence import Attester
from obfuscatune.parties.channel import frames, handshake
from obfuscatune.parties.channel.address import TlsAddress
from obfuscatune.parties.channel.certificate import EnclaveCertificate, fresh_evidence, make_certificate
from obfuscatune.parties.channel.faults import to_fields
from obfuscatune.parties.channel.tls import check_protocol, server_context
from obfuscatune.parties.identity import Identity, PublicIdentity

logger = logging.getLogger(__name__)

Handler = Callable[[PublicIdentity, dict[str, Any], bytes], tuple[dict[str, Any], bytes]]
_RENEWAL_SECONDS = 60.0
_CLOSING_SECONDS = 5.0


class AttestedServer:
    """Serves parties that ``allow`` knows, each after the enclave has proved itself to it.

    Args:
        address: ``tls://HOST:PORT``; port 0 lets the system pick one, which `address` then tells.
        identity: the enclave's; only its public half goes into evidence.
        attester: the hardware.
        allow: whether a party that has proved its identity may make requests.
        handle: answers one request of a party; called from several threads at once, for one party's connections too.
            Its ObfuscatuneErrors go to the party as they are, of other exceptions it learns nothing.
        timeout: seconds for the handshake, from accept to the end of authentication, and for taking a reply.
        idle_timeout: seconds within which an authenticated party's next request must have arrived.
        max_connections: at once; more are closed without a word.

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
        timeout: float = 10.0,
        idle_timeout: float = 300.0,
        max_connections: int = 32,
    ) -> None:
        self._identity, self._attester = identity.public, attester
        self._allow, self._handle = allow, handle
        self._timeout, self._idle_timeout = timeout, idle_timeout
        self._slots = threading.BoundedSemaphore(max_connections)
        self._lock = threading.Lock()  # of the two below
        self._open: dict[threading.Thread, socket.socket] = {}
        self._closed = False
        self._attesting = threading.Lock()  # one quote at a time: the hardware's interface is one
        self._certificate = make_certificate(self._identity, attester)
        self._context, self._made = server_context(self._certificate), time.monotonic()
        parsed = TlsAddress.parse(address)
        self._listener = parsed.listen()
        self.address = str(TlsAddress(parsed.host, self._listener.getsockname()[1]))

    def serve_forever(self) -> None:
        """Accept connections until `close`; whatever one of them sends, the next is served."""
        while True:
            try:
                accepted, _ = self._listener.accept()
            except OSError as error:
                if self._closed:
                    return
                logger.warning("cannot accept a connection: %s", error.strerror)
                if self._listener.fileno() < 0:
                    raise UsageError("the listener is gone", where=self.address) from None
                time.sleep(0.1)  # out of descriptors: connections that end give some back
                continue
            if not self._slots.acquire(blocking=False):
                accepted.close()
                continue
            thread = threading.Thread(target=self._serve, args=(accepted,), daemon=True)
            with self._lock:  # a thread that `close` finds has been started
                self._open[thread] = accepted
                thread.start()

    def close(self) -> None:
        """Stop listening, end all connections and wait a few seconds for their threads; again does no harm."""
        with self._lock:
            self._closed = True
            pending = dict(self._open)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the accept in another thread
        self._listener.close()
        for sock in pending.values():
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        deadline = time.monotonic() + _CLOSING_SECONDS
        for thread in pending:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _serve(self, accepted: socket.socket) -> None:
        """One connection, from TLS to its end; nothing that happens in it leaves this method."""
        try:
            self._converse(accepted)
        except ConnectionClosedError as error:
            logger.debug("connection ended: %s", error)
        except ObfuscatuneError as error:
            logger.warning("connection refused: %s", error)
        except OSError as error:  # no TLS, another version, or gone: whoever can reach the port can do it
            logger.debug("connection ended in its handshake: %s", type(error).__name__)
        except Exception as error:  # the boundary of the server
            logger.warning("connection failed: %s", type(error).__name__)
        finally:
            accepted.close()
            with self._lock:
                self._open.pop(threading.current_thread(), None)
            self._slots.release()

    def _converse(self, accepted: socket.socket) -> None:
        deadline = time.monotonic() + self._timeout
        certificate, context = self._credentials()
        accepted.settimeout(self._timeout)
        with context.wrap_socket(accepted, server_side=True, do_handshake_on_connect=False) as secured:
            with self._lock:  # wrapping has moved the descriptor
                self._open[threading.current_thread()] = secured
                if self._closed:
                    return
            secured.do_handshake()
            check_protocol(secured, "client")
            stream = frames.Stream(secured, "client")
            try:
                client = self._greet(stream, certificate, deadline)
            except ConnectionClosedError:
                raise
            except ObfuscatuneError as error:
                self._send(stream, to_fields(error), b"", frames.ANSWER)
                raise
            self._answer_all(stream, client)

    def _greet(self, stream: frames.Stream, certificate: EnclaveCertificate, deadline: float) -> PublicIdentity:
        fields, _ = stream.receive(frames.HELLO, deadline=deadline)
        nonce, own_nonce = handshake.read_hello(fields), os.urandom(32).hex()
        with self._attesting:
            evidence = fresh_evidence(self._identity, self._attester, certificate.tls_key, nonce).to_bytes()
        stream.send(handshake.evidence_reply(own_nonce), evidence, limits=frames.EVIDENCE, deadline=deadline)
        fields, _ = stream.receive(frames.AUTHENTICATE, deadline=deadline)
        transcript = handshake.Transcript(
            handshake.digest(certificate.der), nonce, own_nonce, handshake.digest(evidence)
        )
        # The signature first: only who holds an identity's key may learn whether it is known here.
        client = handshake.read_authenticate(fields, transcript)
        if self._allow(client) is not True:
            hint = "the enclave's operator names the parties' identity files at its start"
            raise ConsentError("client is not known to this enclave", got=client.fingerprint, hint=hint)
        stream.send({"type": "accepted"}, limits=frames.ANSWER, deadline=deadline)
        return client

    def _answer_all(self, stream: frames.Stream, client: PublicIdentity) -> None:
        last = 0
        while True:
            message, payload = stream.receive(frames.SESSION, deadline=time.monotonic() + self._idle_timeout)
            number, fields = message.get("id"), message.get("fields")
            if set(message) != {"fields", "id"} or type(number) is not int or not isinstance(fields, dict):
                raise ProtocolError("not a request", expected="fields and id")
            if number <= last:
                raise ProtocolError("id of a request does not increase", expected=f"above {last}")
            last = number
            reply, data = self._answer(client, fields, payload)
            try:
                self._send(stream, {"id": number, **reply}, data, frames.SESSION)
            except UsageError:  # nothing of it was sent, and this one always fits
                error = ObfuscatuneError("the reply is beyond the limits of a message")
                self._send(stream, {"id": number, **to_fields(error)}, b"", frames.SESSION)

    def _answer(self, client: PublicIdentity, fields: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes]:
        try:
            reply, data = self._handle(client, fields, payload)
        except Exception as error:  # whatever one request provokes, the next one is served
            logger.warning("request failed: %s", error if isinstance(error, ObfuscatuneError) else type(error).__name__)
            return to_fields(error), b""
        return {"fields": reply}, data

    def _send(
        self, stream: frames.Stream, fields: dict[str, Any], payload: bytes, limits: frames.MessageLimits
    ) -> None:
        stream.send(fields, payload, limits=limits, deadline=time.monotonic() + self._timeout)

    def _credentials(self) -> tuple[EnclaveCertificate, Any]:
        """Return a certificate younger than a minute and its context."""
        with self._attesting:
            if time.monotonic() - self._made > _RENEWAL_SECONDS:
                self._certificate = make_certificate(self._identity, self._attester)
                self._context, self._made = server_context(self._certificate), time.monotonic()
            return self._certificate, self._context
