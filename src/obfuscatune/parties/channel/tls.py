"""The TLS contexts of both ends of the channel; what they have in common with a worker's link is `protocol.tls`."""

import os
import ssl

from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

from obfuscatune.parties.channel.certificate import EnclaveCertificate
from obfuscatune.protocol import tls

ALPN = "obfuscatune-channel/1"


def server_context(certificate: EnclaveCertificate) -> ssl.SSLContext:
    """Return the context of an enclave with this certificate. It asks no client for one: clients sign, later."""
    context = tls.bare_context(ssl.PROTOCOL_TLS_SERVER, ALPN)
    password = os.urandom(32).hex()
    encryption = BestAvailableEncryption(password.encode())
    key = certificate.private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    tls.load_chain(context, ssl.DER_cert_to_PEM_cert(certificate.der) + key.decode(), password)
    return context


def client_context() -> ssl.SSLContext:
    """Return the context of a client: evidence names the enclave's key, and is judged before a byte is sent."""
    return tls.bare_context(ssl.PROTOCOL_TLS_CLIENT, ALPN)


def check_protocol(sock: ssl.SSLSocket, where: str) -> None:
    """Refuse a connection that is not TLS 1.3 of this protocol; raises ProtocolError."""
    tls.check_protocol(sock, ALPN, where)
