"""Those who sit between: TLS ends with any certificate, relays that read and change what passes, bare clients."""

import contextlib
import datetime
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import cbor2
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from obfuscatune.parties.attestation.evidence import Evidence
from obfuscatune.parties.canonical import encode
from obfuscatune.parties.channel import frames
from obfuscatune.parties.channel.address import TlsAddress
from obfuscatune.parties.channel.certificate import CBOR_TAG, OID, EnclaveCertificate
from obfuscatune.parties.channel.frames import Stream
from obfuscatune.parties.channel.tls import client_context, server_context

SECONDS = 20.0
ANY = frames.MessageLimits(1 << 20, frames.MAX_PIECE_BYTES)
Script = Callable[[Stream], None]


def soon() -> float:
    return time.monotonic() + SECONDS


def forged_certificate(
    evidence: Evidence | None = None, value: bytes | None = None, key: Any = None
) -> EnclaveCertificate:
    """A certificate of the attacker's own key that carries somebody's evidence, or any bytes, or nothing."""
    key = key or generate_private_key(SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "obfuscatune enclave")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    if evidence is not None:
        value = cbor2.dumps(cbor2.CBORTag(CBOR_TAG, [evidence.to_bytes(), encode(dict(evidence.claims))]))
    if value is not None:
        builder = builder.add_extension(x509.UnrecognizedExtension(OID, value), critical=False)
    return EnclaveCertificate(builder.sign(key, SHA256()).public_bytes(Encoding.DER), "", key)


@contextlib.contextmanager
def tls_end(context: ssl.SSLContext, script: Script) -> Iterator[str]:
    """The address of a TLS server that runs ``script`` with its one client; closing the client ends it."""
    listener = TlsAddress("127.0.0.1", 0).listen()
    opened: list[socket.socket] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            accepted, _ = listener.accept()
            accepted.settimeout(SECONDS)
            with context.wrap_socket(accepted, server_side=True) as secured:
                opened.append(secured)
                with contextlib.suppress(Exception):
                    script(Stream(secured, "victim"))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"tls://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(SECONDS)
        assert not thread.is_alive()


class Relay:
    """Ends the victim's TLS with ``certificate`` and speaks to the enclave for it; keeps every plain byte of both.

    ``change`` may replace the messages that come back from the enclave, by their number.
    """

    def __init__(
        self,
        enclave: str,
        certificate: EnclaveCertificate,
        change: Callable[[int, dict[str, Any], bytes], tuple[dict[str, Any], bytes]] | None = None,
    ) -> None:
        self.from_victim: list[tuple[dict[str, Any], bytes]] = []
        self.from_enclave: list[tuple[dict[str, Any], bytes]] = []
        self._enclave, self._change = enclave, change
        self.context = server_context(certificate)

    def run(self, victim: Stream) -> None:
        with bare_client(self._enclave) as enclave:
            while True:
                message = victim.receive(ANY, deadline=soon())
                self.from_victim.append(message)
                enclave.send(*message, limits=ANY, deadline=soon())
                reply = enclave.receive(ANY, deadline=soon())
                if self._change is not None:
                    reply = self._change(len(self.from_enclave), *reply)
                self.from_enclave.append(reply)
                victim.send(*reply, limits=ANY, deadline=soon())

    def sent_types(self) -> list[Any]:
        """What the victim has sent, by type."""
        return [fields.get("type", "request") for fields, _ in self.from_victim]


@contextlib.contextmanager
def bare_client(address: str) -> Iterator[Stream]:
    """A TLS connection to an enclave, with nothing said on it, and nothing checked."""
    sock = TlsAddress.parse(address).connect(SECONDS)
    sock.settimeout(SECONDS)
    with client_context().wrap_socket(sock) as secured:
        stream = Stream(secured, "enclave")
        try:
            yield stream
        finally:
            stream.close()


def certificate_of(address: str) -> bytes:
    """The DER that the enclave shows to anybody."""
    sock = TlsAddress.parse(address).connect(SECONDS)
    sock.settimeout(SECONDS)
    with client_context().wrap_socket(sock) as secured:
        return secured.getpeercert(binary_form=True) or b""


@contextlib.contextmanager
def tcp_forwarder(target: str) -> Iterator[tuple[str, bytearray]]:
    """An honest cable: its address, and every byte that went through it in either direction."""
    seen = bytearray()
    listener = TlsAddress("127.0.0.1", 0).listen()
    threads: list[threading.Thread] = []

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                seen.extend(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def serve() -> None:
        with contextlib.suppress(OSError):
            near, _ = listener.accept()
            with near, TlsAddress.parse(target).connect(SECONDS) as far:
                back = threading.Thread(target=pump, args=(far, near))
                back.start()
                pump(near, far)
                back.join(SECONDS)

    threads.append(threading.Thread(target=serve))
    threads[0].start()
    try:
        yield f"tls://127.0.0.1:{listener.getsockname()[1]}", seen
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        threads[0].join(SECONDS)
        assert not threads[0].is_alive()
