"""TLS 1.3 from the standard library: contexts that trust nothing of the system's, and the worker's link by them.

Contexts are made by `ssl.SSLContext` and not by `create_default_context`: that one writes the session's secrets into
the file which the environment variable SSLKEYLOGFILE names, and the environment belongs to the operator.

On a link each side has an identity, an Ed25519 key. With it, it signs a leaf certificate over a TLS key that only lives
as long as its process. The worker has a trust anchor for each enclave that may connect, so OpenSSL refuses a stranger
within the handshake. The enclave has the fingerprint of the worker's identity, and compares before it sends a byte.
What signs, and what compares, is `obfuscatune.parties.link`: the worker's process needs no more than this module.
"""

import json
import socket
import ssl
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from obfuscatune.errors import ProtocolError, UsageError

ALPN = "obfuscatune-worker/2"
MAX_CREDENTIALS_BYTES = 4 * 1024**2  # some thousands of anchors


@dataclass(frozen=True)
class Credentials:
    """What one end of a link shows and trusts.

    Attributes:
        fingerprint: of the own identity, 64 hex digits. chain: its leaf certificate and TLS key, PEM, the key under the
            password. password: secret, as long as the process lives. anchors: certificates of the identities that may
            connect, PEM; empty at the end that connects, which compares a fingerprint instead.
    """

    fingerprint: str
    chain: str
    password: str = field(repr=False)
    anchors: str = ""

    def to_bytes(self) -> bytes:
        """Return them for a pipe to the worker's process: never for an argument, the environment or a disk."""
        return json.dumps(vars(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Credentials":
        """Return what `to_bytes` gave; raises UsageError."""
        try:
            fields = json.loads(data)
            if all(isinstance(value, str) for value in fields.values()):
                return cls(**fields)
        except (ValueError, TypeError, AttributeError):
            pass
        raise UsageError("credentials of a link", got="something else") from None


def bare_context(protocol: int, alpn: str) -> ssl.SSLContext:
    """Return a context for TLS 1.3 and one protocol name, without tickets and without any trust."""
    context = ssl.SSLContext(protocol)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols([alpn])
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # a resumed session would show no certificate
    else:
        # No authority vouches for the peer and no name is checked: its certificate is judged by what is in it, before
        # a byte of content is sent. TLS still proves that the peer holds its key, whatever verify_mode says.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.options |= ssl.OP_NO_TICKET
    return context


def load_chain(context: ssl.SSLContext, chain: str, password: str) -> None:
    """Let a context show a certificate; ``chain`` is PEM with its key, encrypted under the password."""
    # `ssl` reads keys from files only. What is in the file is of no use without a password that is never written.
    with tempfile.TemporaryDirectory(prefix="obfuscatune-") as directory:  # made with mode 0700
        path = Path(directory) / "key.pem"
        path.write_bytes(chain.encode())
        context.load_cert_chain(path, password=password)


def check_protocol(sock: ssl.SSLSocket, alpn: str, where: str) -> None:
    """Refuse a connection that is not TLS 1.3 of this protocol; raises ProtocolError."""
    if sock.version() != "TLSv1.3" or sock.selected_alpn_protocol() != alpn:
        raise ProtocolError("peer speaks another protocol", expected=f"{alpn} over TLS 1.3", where=where)


def worker_context(credentials: Credentials) -> ssl.SSLContext:
    """Return the context of a worker: who shows no certificate under one of its anchors fails in the handshake."""
    context = bare_context(ssl.PROTOCOL_TLS_SERVER, ALPN)
    load_chain(context, credentials.chain, credentials.password)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=credentials.anchors)
    return context


def enclave_context(credentials: Credentials) -> ssl.SSLContext:
    """Return the context of an enclave: it takes any certificate, which its caller judges before it sends a byte."""
    context = bare_context(ssl.PROTOCOL_TLS_CLIENT, ALPN)
    load_chain(context, credentials.chain, credentials.password)
    return context


def accept_tls(sock: socket.socket, context: ssl.SSLContext, where: str) -> ssl.SSLSocket:
    """Do the worker's part of the handshake; the caller bounds its time.

    Raises:
        OSError: no TLS 1.3, no certificate under an anchor, or gone. ProtocolError: another protocol name.
    """
    return _shaken(context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False), where)


def connect_tls(sock: socket.socket, context: ssl.SSLContext, where: str) -> ssl.SSLSocket:
    """Do the enclave's part of the handshake within the socket's timeout. Raises as `accept_tls`.

    The worker may refuse the enclave's certificate after this has returned: that is how TLS 1.3 goes.
    """
    return _shaken(context.wrap_socket(sock, do_handshake_on_connect=False), where)


def _shaken(sock: ssl.SSLSocket, where: str) -> ssl.SSLSocket:
    try:
        sock.do_handshake()
        check_protocol(sock, ALPN, where)
    except BaseException:
        sock.close()
        raise
    return sock


def reason(error: OSError) -> Any:
    """What to tell of a failed handshake: OpenSSL's own word for it, without its source lines."""
    return getattr(error, "reason", None) or error.strerror or type(error).__name__
