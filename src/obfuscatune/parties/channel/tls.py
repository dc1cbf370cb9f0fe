"""The TLS contexts of both ends: TLS 1.3, one protocol name, no tickets, nothing of the system's trust.

Made by `ssl.SSLContext` and not by `create_default_context`: that one writes the session's secrets into the file which
the environment variable SSLKEYLOGFILE names, and the environment belongs to the operator.
"""

import os
import ssl
import tempfile
from pathlib import Path

from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

from obfuscatune.errors import ProtocolError
from obfuscatune.parties.channel.certificate import EnclaveCertificate

ALPN = "obfuscatune-channel/1"


def server_context(certificate: EnclaveCertificate) -> ssl.SSLContext:
    """Return the context of an enclave with this certificate. It asks no client for one: clients sign, later."""
    context = _context(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # a resumed session would show no certificate, so no evidence
    # `ssl` reads keys from files only. What is in the file is of no use without a password that is never written.
    password = os.urandom(32).hex().encode()
    pem = certificate.private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(password))
    with tempfile.TemporaryDirectory(prefix="obfuscatune-") as directory:  # made with mode 0700
        path = Path(directory) / "key.pem"
        path.write_bytes(ssl.DER_cert_to_PEM_cert(certificate.der).encode() + pem)
        context.load_cert_chain(path, password=password)
    return context


def client_context() -> ssl.SSLContext:
    """Return the context of a client."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    # No authority vouches for an enclave and no name is checked: its evidence names its key, and is judged before a
    # byte of content is sent. TLS still proves that the peer holds the certificate's key, whatever verify_mode says.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.options |= ssl.OP_NO_TICKET
    return context


def check_protocol(sock: ssl.SSLSocket, where: str) -> None:
    """Refuse a connection that is not TLS 1.3 of this protocol; raises ProtocolError."""
    if sock.version() != "TLSv1.3" or sock.selected_alpn_protocol() != ALPN:
        raise ProtocolError("peer speaks another protocol", expected=f"{ALPN} over TLS 1.3", where=where)


def _context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols([ALPN])
    return context
