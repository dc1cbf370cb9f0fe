"""Frames over TLS: the same as over a plain socket, whatever the sizes, the waits and the threads."""

import datetime
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from obfuscatune.errors import ConnectionClosedError
from obfuscatune.protocol.connection import Connection


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Of a server with a certificate made here, and of a client that takes any."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .sign(key, SHA256())
    )
    path: Path = tmp_path_factory.mktemp("tls") / "server.pem"
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(certificate.public_bytes(Encoding.PEM) + pem)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(path)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    return server, client


Secured = tuple[Connection, Connection, ssl.SSLSocket]


@pytest.fixture
def secured(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> Iterator[Secured]:
    """Two ends of a TLS connection, and the socket of the second."""
    left, right = socket.socketpair()
    sockets: list[ssl.SSLSocket] = []
    thread = threading.Thread(target=lambda: sockets.append(contexts[0].wrap_socket(left, server_side=True)))
    thread.start()
    theirs = contexts[1].wrap_socket(right)
    thread.join(timeout=20)
    a, b = Connection(sockets[0], peer="b"), Connection(theirs, peer="a")
    for end in (a, b):
        end.settimeout(20)
    with closing(a), closing(b):
        yield a, b, theirs


SIZES = {"few": 3, "none": 0, "a record": 16 * 1024, "many": 3 * 1024**2 + 1}


def test_tensors_of_all_sizes(secured: Secured) -> None:
    a, b, _ = secured
    tensors = {name: torch.randint(0, 255, (size,), dtype=torch.uint8) for name, size in SIZES.items()}
    thread = threading.Thread(target=a.send, args=({"id": 7}, tensors))
    thread.start()
    fields, found = b.receive()
    thread.join(timeout=20)
    assert fields == {"id": 7}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert a.bytes_sent == b.bytes_received > sum(SIZES.values())


def test_both_directions_at_once(secured: Secured) -> None:
    """One thread of each end sends while the other one receives, on OpenSSL's one object of that end."""
    a, b, _ = secured
    sent = torch.arange(2 * 1024**2)
    failures: list[int] = []

    def send(end: Connection) -> None:
        for i in range(8):
            end.send({"id": i}, {"x": sent + i})

    def receive(end: Connection) -> None:
        failures.extend(i for i in range(8) if not torch.equal(end.receive()[1]["x"], sent + i))

    threads = [threading.Thread(target=work, args=(end,)) for work in (send, receive) for end in (a, b)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not failures
    assert a.bytes_received == b.bytes_sent == b.bytes_received


def test_a_peer_that_does_not_read_is_read_meanwhile(secured: Secured) -> None:
    """Both send more than the buffers hold; one of them reads while it cannot send, so that neither waits for ever."""
    a, b, _ = secured
    x = torch.arange(4 * 1024**2)
    replies: list[torch.Tensor] = []

    def read() -> bool:
        frame = a.receive_part()
        if frame is not None:
            replies.append(frame.tensors["x"])
        return True

    def other() -> None:
        b.send({"id": 1}, {"x": x})
        b.receive()

    thread = threading.Thread(target=other)
    thread.start()
    a.send({"id": 2}, {"x": x}, meanwhile=read)
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert len(replies) == 1
    assert torch.equal(replies[0], x)


def test_waiting_for_a_frame_leaves_the_connection_open(secured: Secured) -> None:
    a, b, _ = secured
    b.settimeout(0.01)
    with pytest.raises(TimeoutError):
        b.receive()
    a.send({"id": 3})
    assert b.receive()[0] == {"id": 3}


def test_a_peer_that_stops_within_a_frame(secured: Secured) -> None:
    a, _, theirs = secured
    a.settimeout(0.05)
    theirs.send(b"OBFT\x02\0\0\0")
    with pytest.raises(TimeoutError):
        a.receive()
    with pytest.raises(ConnectionClosedError):
        a.receive()


@pytest.mark.parametrize("tls", [True, False])
def test_a_send_during_which_another_thread_closes_says_so(secured: Secured, tls: bool) -> None:
    """It is between two looks at the socket, which has no descriptor any more."""
    left, right = socket.socketpair()
    plain = Connection(left, peer="w")
    connection = secured[0] if tls else plain
    connection.settimeout(20)

    def close() -> bool:
        connection.close()
        return False

    with closing(plain), closing(Connection(right, peer="w")) as other:
        (secured[1] if tls else other).send({"id": 1})
        with pytest.raises(ConnectionClosedError):
            connection.send({"id": 2}, {"x": torch.zeros(16 * 1024**2)}, meanwhile=close)


def test_a_collector_may_close_in_the_middle_of_a_step(secured: Secured) -> None:
    """A finalizer runs in whatever thread makes garbage, in one that holds the connection's lock too."""
    connection, _, _ = secured

    def step() -> None:
        with connection._stream._lock:
            connection.close()

    thread = threading.Thread(target=step, daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert not thread.is_alive()


def test_a_peer_that_does_not_read(secured: Secured) -> None:
    a, _, _ = secured
    a.settimeout(0.05)
    with pytest.raises(TimeoutError):
        a.send({}, {"x": torch.zeros(16 * 1024**2)})


def test_the_end(secured: Secured) -> None:
    a, b, _ = secured
    b.close()
    with pytest.raises(ConnectionClosedError):
        a.receive()


def test_a_flipped_bit_on_the_wire_ends_the_connection(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    """The negative control of what TLS adds: over a plain socket the same bit is another number."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    left, right = socket.socketpair()
    server = contexts[0].wrap_bio(incoming, outgoing, server_side=True)
    sockets: list[ssl.SSLSocket] = []
    thread = threading.Thread(target=lambda: sockets.append(contexts[1].wrap_socket(right)))
    thread.start()
    with left:
        while True:
            try:
                server.do_handshake()
                break
            except ssl.SSLWantReadError:
                left.sendall(outgoing.read())
                incoming.write(left.recv(65536))
        left.sendall(outgoing.read())
        thread.join(timeout=20)
        with closing(Connection(sockets[0], peer="w")) as connection:
            connection.settimeout(20)
            server.write(b"OBFT" + bytes(16))
            record = bytearray(outgoing.read())
            record[-1] ^= 1
            left.sendall(record)
            with pytest.raises(ConnectionClosedError):
                connection.receive()
