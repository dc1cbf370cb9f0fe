"""The client's end: it sends a nonce, judges what comes back, and only then says who it is and what it wants."""

import os
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from obfuscatune.errors import (
    AttestationError,
    BusyError,
    ConnectionClosedError,
    ObfuscatuneError,
    ProtocolError,
    UsageError,
)
from obfuscatune.parties.attestation.evidence import Evidence
from obfuscatune.parties.attestation.policy import Policy
from obfuscatune.parties.attestation.verdict import Verdict
from obfuscatune.parties.channel import frames, handshake
from obfuscatune.parties.channel.address import TlsAddress
from obfuscatune.parties.channel.certificate import PeerCertificate, read_certificate
from obfuscatune.parties.channel.faults import raise_from
from obfuscatune.parties.channel.places import TRY_AGAIN
from obfuscatune.parties.channel.tls import check_protocol, client_context
from obfuscatune.parties.identity import Identity, PublicIdentity

_FIRST_PAUSE = 0.2  # seconds, when the enclave is busy; each next one is longer


class AttestedChannel:
    """A connection to an enclave that a policy has accepted. One request at a time; others wait for it.

    Attributes:
        verdict: the judgement of the fresh evidence.
        enclave: the identity that the evidence binds: what to seal to.
        members: number and digest of the membership that the enclave is under; None while it is open, see `membership`.
    """

    def __init__(
        self, stream: frames.Stream, verdict: Verdict, timeout: float, members: tuple[int, str] | None = None
    ) -> None:
        self.verdict, self.members = verdict, members
        self.enclave: PublicIdentity = verdict.require().identity
        self._stream, self._timeout = stream, timeout
        self._last = 0
        self._lock = threading.Lock()

    def request(
        self, fields: Mapping[str, Any], payload: bytes = b"", *, timeout: float | None = None
    ) -> tuple[dict[str, Any], bytes]:
        """Send one request and return the reply's fields and payload.

        Args:
            fields: canonical values, at most 256 KiB encoded.
            payload: at most 4 MiB; `transfer` moves longer ones in pieces.
            timeout: seconds for the whole of it, the enclave's work included; None: the channel's.

        Raises:
            ObfuscatuneError: the enclave refuses the request, by the class that it says; the channel goes on.
            ProtocolError: a reply that breaks the protocol, or none in time (ConnectionClosedError); it is closed.
            UsageError: beyond the limits; nothing was sent.
        """
        ((reply, data),) = self.stream(fields, payload, timeout=timeout, most=1)
        return reply, data

    def stream(
        self, fields: Mapping[str, Any], payload: bytes = b"", *, timeout: float | None = None, most: int
    ) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Send one request and yield the parts of its reply, the last of which ends the iteration.

        An iteration that is given up closes the channel, by which the enclave learns that nobody waits any more.

        Args:
            fields, payload, timeout: as of :meth:`request`. most: parts that the reply may have.

        Raises:
            As :meth:`request`; ProtocolError where the parts are too many.
        """
        with self._lock:
            deadline = time.monotonic() + (self._timeout if timeout is None else timeout)
            number = self._last + 1
            message = {"fields": dict(fields), "id": number}
            self._stream.send(message, payload, limits=frames.SESSION, deadline=deadline)
            self._last, ended = number, False
            try:
                for count in range(1, most + 1):
                    reply, data = self._stream.receive(frames.SESSION, deadline=deadline)
                    if not _is_reply(reply, number):
                        raise ProtocolError("not the reply to this request", where=self._stream.peer)
                    ended = "more" not in reply
                    raise_from(reply, self._stream.peer)
                    if not ended and count == most:
                        raise ProtocolError("reply in too many parts", expected=most, where=self._stream.peer)
                    yield reply["fields"], data
                    if ended:
                        return
            finally:
                if not ended:
                    self.close()  # a late or a second reply must never be taken for the next one

    def close(self) -> None:
        """Close the connection; again and again does no harm."""
        self._stream.close()

    def __enter__(self) -> "AttestedChannel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect_attested(
    address: str, *, identity: Identity, policy: Policy, timeout: float = 30.0, enclave: str | None = None
) -> AttestedChannel:
    """Connect to the enclave at ``address`` if ``policy`` accepts it, and prove to be ``identity``.

    Where the enclave is busy, it is asked again until ``timeout``.

    Nothing but a random nonce is sent before the evidence is verified: a refused enclave does not even learn who asked.

    Args:
        address: ``tls://HOST:PORT``.
        identity: the client's.
        policy: what the client takes for an enclave.
        timeout: seconds for the whole handshake, and later for each request.
        enclave: fingerprint of the only enclave identity to accept.

    Raises:
        AttestationError: the evidence is missing, of another key or moment, or refused by the policy.
        BusyError: the enclave had no place in all the time, or said so before the time was over in another attempt.
        ConsentError: the enclave does not know the client.
        ProtocolError: the peer is no enclave of this protocol, or gone or too slow (ConnectionClosedError).
        UsageError: nobody answers, or not an address.
    """
    deadline, pause = time.monotonic() + timeout, _FIRST_PAUSE
    busy: BusyError | None = None
    while True:
        try:
            return _connect(address, identity, policy, timeout, deadline, enclave)
        except (ConnectionClosedError, UsageError):
            if busy is None or time.monotonic() < deadline:
                raise
            raise busy from None  # the last attempt had no time to be told so again
        except BusyError as error:
            busy = error
            # Those who were turned away together must not come back together.
            pause *= 1 + int.from_bytes(os.urandom(2), "big") / (1 << 16)
            if time.monotonic() + pause > deadline:
                raise
            time.sleep(pause)


def _connect(
    address: str, identity: Identity, policy: Policy, timeout: float, deadline: float, enclave: str | None
) -> AttestedChannel:
    stream, certificate = _open(address, max(deadline - time.monotonic(), 1e-3), deadline)
    try:
        nonce = os.urandom(32).hex()
        server_nonce, payload = _nonce_round(stream, nonce, deadline)
        verdict = handshake.judge_enclave(certificate, payload, nonce, policy, enclave)
        transcript = handshake.Transcript(certificate.digest, nonce, server_nonce, handshake.digest(payload))
        message = handshake.authenticate(identity, transcript)
        stream.send(message, limits=frames.AUTHENTICATE, deadline=deadline)
        answer, _ = stream.receive(frames.ANSWER, deadline=deadline)
        raise_from(answer, stream.peer)
        members = handshake.read_accepted(answer)
    except BaseException as error:
        stream.close()
        if type(error) is AttestationError and error.where is None:
            raise _located(error, stream.peer) from None
        raise
    return AttestedChannel(stream, verdict, timeout, members)


def fetch_evidence(address: str, *, timeout: float = 30.0, nonce: str | None = None) -> tuple[Evidence, str]:
    """Return fresh evidence of the enclave at ``address`` and the nonce in it, without saying who asks.

    The evidence names this connection's TLS key and the nonce, but nothing has judged it: give it to `judge`.

    Args:
        address: ``tls://HOST:PORT``.
        timeout: seconds for all of it.
        nonce: 64 hex digits; None: 32 bytes of the system's generator.

    Raises:
        AttestationError: the evidence cannot be read, or is of another key or nonce.
        ProtocolError: the peer is no enclave of this protocol, or gone or too slow (ConnectionClosedError).
        UsageError: nobody answers, not an address, or not a nonce.
    """
    if nonce is not None and not handshake.is_nonce(nonce):
        raise UsageError("not a nonce", expected="64 lower-case hex digits")
    nonce = nonce or os.urandom(32).hex()
    deadline = time.monotonic() + timeout
    stream, certificate = _open(address, timeout, deadline)
    try:
        _, payload = _nonce_round(stream, nonce, deadline)
        evidence, _ = handshake.read_fresh(payload, certificate, nonce)
    finally:
        stream.close()
    return evidence, nonce


def _open(address: str, timeout: float, deadline: float) -> tuple[frames.Stream, PeerCertificate]:
    parsed = TlsAddress.parse(address)
    sock = parsed.connect(timeout)
    problem: ObfuscatuneError
    try:
        secured = client_context().wrap_socket(sock, do_handshake_on_connect=False)
    except OSError as error:
        sock.close()
        raise ConnectionClosedError("TLS handshake failed", got=error.strerror, where=address) from None
    stream = frames.Stream(secured, str(parsed))
    try:
        secured.settimeout(max(deadline - time.monotonic(), 1e-3))
        secured.do_handshake()
        check_protocol(secured, address)
        return stream, read_certificate(secured.getpeercert(binary_form=True) or b"")
    except AttestationError as error:
        problem = _located(error, address)
    except ProtocolError as error:
        problem = error
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:
        problem = ConnectionClosedError("TLS handshake failed", got=error.reason or "end of stream", where=address)
    except ssl.SSLError as error:
        problem = ProtocolError("TLS handshake failed", got=error.reason, expected="TLS 1.3", where=address)
    except OSError as error:  # as of a forwarder that has nothing behind it
        late = isinstance(error, TimeoutError)
        hint = "something listens there and says nothing: a stopped enclave, or another port" if late else None
        got = "timeout" if late else error.strerror
        problem = ConnectionClosedError("TLS handshake failed", got=got, where=address, hint=hint)
    except ValueError:
        problem = ProtocolError("TLS handshake failed", where=address)
    stream.close()
    raise problem from None


def _nonce_round(stream: frames.Stream, nonce: str, deadline: float) -> tuple[str, bytes]:
    """Return the enclave's nonce and its fresh evidence as received."""
    stream.send(handshake.hello(nonce), limits=frames.HELLO, deadline=deadline)
    reply, payload = stream.receive(frames.EVIDENCE, deadline=deadline)
    if reply.get("error") == "busy":
        raise BusyError("the enclave is busy", where=stream.peer, hint=TRY_AGAIN)
    if "error" in reply:  # its text is not shown: nobody has proved yet to be an enclave
        raise ProtocolError("peer refuses the hello", expected=f"version {handshake.VERSION}", where=stream.peer)
    return handshake.read_evidence_reply(reply), payload


def _is_reply(reply: Mapping[str, Any], number: int) -> bool:
    """Whether it is a reply, or a part of one, to the request of that number."""
    names = {"error", "id", "message"} if "error" in reply else {"fields", "id"}
    right = type(reply.get("id")) is int and reply["id"] == number and isinstance(reply.get("fields", {}), dict)
    if "more" in reply:
        return right and set(reply) == {"fields", "id", "more"} and type(reply["more"]) is int and reply["more"] == 1
    return right and set(reply) == names


def _located(error: AttestationError, where: str) -> AttestationError:
    return AttestationError(error.what, got=error.got, expected=error.expected, where=where, hint=error.hint)
