"""A worker at tls://: who is let in, who is not, and that an enclave sends nothing to anybody else."""

import contextlib
import datetime
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from transformers import GPT2Config, GPT2LMHeadModel

import obfuscatune
from obfuscatune.durable import write_new
from obfuscatune.enclave.spawn import check_workers, open_session
from obfuscatune.errors import AttestationError, KeyFaultError, UsageError, WorkerFault
from obfuscatune.parties import link
from obfuscatune.parties.canonical import encode
from obfuscatune.parties.identity import Identity
from obfuscatune.parties.link import check_worker, credentials_of
from obfuscatune.protocol.address import Address
from obfuscatune.protocol.tls import ALPN, Credentials, accept_tls, bare_context, enclave_context, worker_context

from ..worker.processes import PATIENCE, worker

WORKER, LAB, MALLORY = (Identity.generate(name, "x25519") for name in ("gpu1", "lab", "mallory"))


@dataclass(frozen=True)
class Running:
    """A worker that allows LAB, and what its process has said."""

    address: Address
    process: "subprocess.Popen[str]"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("identities")
    write_new(directory / "gpu1.key", WORKER.to_bytes())
    (directory / "lab.pub").write_bytes(encode(LAB.public.to_dict()))
    options = ("--identity", directory / "gpu1.key", "--allow", directory / "lab.pub", "--max_sessions", "4")
    with worker("--listen", "tls://127.0.0.1:0", *options) as (process, address):
        yield Running(address, process)


def session(running: Running, identity: Identity | None = LAB, **changes: str) -> dict[str, object]:
    """What the worker says to an enclave of this identity."""
    address = f"tls://127.0.0.1:{running.address.port}#{changes.get('fingerprint', WORKER.public.fingerprint)}"
    opened = open_session(address, timeout=PATIENCE, threads=None, device=None, identity=identity)
    try:
        return opened.hello()
    finally:
        opened.close()


def still_serves(running: Running) -> bool:
    return session(running)["device"] == "cpu"


def test_the_worker_tells_its_whole_address(running: Running) -> None:
    assert running.address.tls
    assert running.address.fingerprint == WORKER.public.fingerprint
    assert still_serves(running)


def test_a_model_over_tls_is_the_model(running: Running, tmp_path: Path) -> None:
    config = GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=50, n_positions=32, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0
    )
    model, ids = GPT2LMHeadModel(config).eval(), torch.arange(12)[None]
    expected = model(ids).logits
    write_new(tmp_path / "lab.key", LAB.to_bytes())
    address = str(running.address)
    with pytest.raises(KeyFaultError, match="test seed is refused"):
        obfuscatune.protect(model, worker=address, identity=LAB, insecure_test_seed=1)
    with obfuscatune.protect(model, worker=address, identity=tmp_path / "lab.key", timeout=PATIENCE) as protected:
        torch.testing.assert_close(protected.model(ids).logits, expected)


def test_a_stranger_is_refused_and_told_how_to_be_let_in(running: Running) -> None:
    with pytest.raises(UsageError, match=f"does not let this identity in.*\nhint: .*{MALLORY.public.fingerprint}"):
        session(running, MALLORY)
    assert still_serves(running)


def test_another_worker_gets_nothing(running: Running) -> None:
    with pytest.raises(AttestationError, match="the worker has another identity"):
        session(running, fingerprint=MALLORY.public.fingerprint)


def test_who_has_no_identity_or_no_fingerprint_is_told_so(running: Running) -> None:
    with pytest.raises(UsageError, match="needs an identity of this enclave"):
        session(running, None)
    bare = f"tls://127.0.0.1:{running.address.port}"
    with pytest.raises(UsageError, match="no fingerprint of the worker"):
        open_session(bare, timeout=PATIENCE, threads=None, device=None, identity=LAB)


def test_an_identity_is_read_once_for_all_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A locked one asks for its passphrase each time that it is read."""
    path, read = tmp_path / "lab.key", []
    write_new(path, LAB.to_bytes() + b"\n", mode=0o600)
    load = Identity.load
    monkeypatch.setattr(Identity, "load", lambda path: read.append(path) or load(path))
    place = {"threads": None, "device": None, "insecure": False}
    workers = [f"tls://{host}.example:7000#{64 * 'a'}" for host in "abc"]
    own = check_workers(workers, identity=path, **place)
    assert own is not None and own.public == LAB.public
    assert check_workers(workers, identity=own, **place) is own and read == [path]
    assert check_workers(["spawn", "unix:///run/w"], identity=path, **place) is None and read == [path]


def forged(claimed: Identity, signer: Identity) -> Credentials:
    """A leaf that names an allowed identity and is signed by another key."""
    honest = credentials_of(claimed, "enclave")
    certificate = x509.load_pem_x509_certificate(honest.chain.encode())
    key = Ed25519PrivateKey.generate()
    builder = x509.CertificateBuilder(
        issuer_name=certificate.issuer,
        subject_name=certificate.subject,
        public_key=key.public_key(),
        serial_number=1,
        not_valid_before=certificate.not_valid_before_utc,
        not_valid_after=certificate.not_valid_after_utc,
        extensions=list(certificate.extensions),
    )
    leaf = signer.sign_certificate(builder).public_bytes(Encoding.PEM)
    return Credentials("", (leaf + key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())).decode(), "")


def plain() -> ssl.SSLContext:
    return bare_context(ssl.PROTOCOL_TLS_CLIENT, ALPN)


def older() -> ssl.SSLContext:
    context = enclave_context(credentials_of(LAB, "enclave"))
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


STRANGERS: dict[str, Callable[[], ssl.SSLContext]] = {
    "no certificate": plain,
    "unknown": lambda: enclave_context(credentials_of(MALLORY, "enclave")),
    "signed by another": lambda: enclave_context(forged(LAB, MALLORY)),
    "its own worker's leaf": lambda: enclave_context(credentials_of(WORKER, "worker")),
    "a worker's leaf of an allowed one": lambda: enclave_context(credentials_of(LAB, "worker")),
    "TLS 1.2": older,
}


@pytest.mark.parametrize("name", STRANGERS)
def test_strangers_fail_in_the_handshake(name: str, running: Running) -> None:
    """Under TLS 1.3 a client learns of it at its first read: it gets an alert, and not the worker's first frame."""
    with (
        socket.create_connection(("127.0.0.1", running.address.port), PATIENCE) as sock,
        pytest.raises((ssl.SSLError, ConnectionResetError)),
        STRANGERS[name]().wrap_socket(sock) as secured,
    ):
        secured.sendall(b"OBFT")
        assert secured.recv(1) == b"", "an alert is an error; this is neither"
        raise ConnectionResetError


def test_the_same_client_with_its_own_certificate_is_let_in(running: Running) -> None:
    """The control of the above."""
    context = enclave_context(credentials_of(LAB, "enclave"))
    with (
        socket.create_connection(("127.0.0.1", running.address.port), PATIENCE) as sock,
        context.wrap_socket(sock) as secured,
    ):
        assert secured.recv(4) == b"OBFT"


@pytest.mark.parametrize(
    "sent", [b"OBFT\x02" + bytes(15), b"GET / HTTP/1.1\r\n\r\n", bytes(1000), b"\x16\x03\x01\xff\xff"]
)
def test_bytes_that_are_no_tls(sent: bytes, running: Running) -> None:
    with socket.create_connection(("127.0.0.1", running.address.port), PATIENCE) as sock:
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while sock.recv(1000):
                pass
    assert still_serves(running)


def test_openssl_agrees(running: Running) -> None:
    """A stock client without a certificate gets TLS 1.3, a request for one, and an alert."""
    command = [
        "openssl",
        "s_client",
        "-connect",
        f"127.0.0.1:{running.address.port}",
        "-alpn",
        ALPN,
        "-tls1_3",
        "-ign_eof",
    ]
    try:
        done = subprocess.run(command, input=b"x", capture_output=True, timeout=PATIENCE)  # noqa: S603
    except FileNotFoundError:
        pytest.skip("no openssl here")
    assert b"certificate required" in done.stderr
    assert b"OBFT" not in done.stdout


@contextlib.contextmanager
def impostor(credentials: Credentials, says: bytes = b"") -> Iterator[tuple[int, list[bytes]]]:
    """A server with these credentials that lets anybody in, and what it reads from who connects."""
    context = worker_context(credentials)
    read: list[bytes] = []

    def serve() -> None:
        accepted, _ = listener.accept()
        with contextlib.suppress(OSError), accepted:
            accepted.settimeout(PATIENCE)
            with accept_tls(accepted, context, "enclave") as secured:
                secured.sendall(says)
                read.append(secured.recv(1000))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1], read
        thread.join(PATIENCE)
        assert not thread.is_alive()


@pytest.mark.parametrize("kind", ["another", "claims to be it", "an enclave's leaf"])
def test_an_enclave_sends_no_byte_to_an_impostor(kind: str) -> None:
    made = {
        "another": lambda: credentials_of(MALLORY, "worker", allow=[LAB.public]),
        "claims to be it": lambda: _with_anchor(forged(WORKER, MALLORY)),
        "an enclave's leaf": lambda: credentials_of(WORKER, "enclave", allow=[LAB.public]),
    }
    with impostor(made[kind]()) as (port, read), pytest.raises(AttestationError):
        open_session(
            f"tls://127.0.0.1:{port}#{WORKER.public.fingerprint}",
            timeout=PATIENCE,
            threads=None,
            device=None,
            identity=LAB,
        )
    assert read in ([b""], [])


@pytest.mark.parametrize("says", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"OBFT\x02\0\0\0" + b"\xff" * 12])
def test_a_worker_that_speaks_something_else_is_a_fault_of_it(says: bytes) -> None:
    credentials = credentials_of(WORKER, "worker", allow=[LAB.public])
    with impostor(credentials, says) as (port, _):
        address = f"tls://127.0.0.1:{port}#{WORKER.public.fingerprint}"
        with pytest.raises(WorkerFault, match="the reply breaks the protocol") as caught:
            open_session(address, timeout=PATIENCE, threads=None, device=None, identity=LAB)
    assert caught.value.worker == address


def _with_anchor(credentials: Credentials) -> Credentials:
    return Credentials("", credentials.chain, "", credentials_of(WORKER, "worker", allow=[LAB.public]).anchors)


def der_of(credentials: Credentials) -> bytes:
    return ssl.PEM_cert_to_DER_cert(credentials.chain[: credentials.chain.index("-----BEGIN ENC")])


def test_a_leaf_is_checked() -> None:
    pin = WORKER.public.fingerprint
    der = der_of(credentials_of(WORKER, "worker"))
    assert check_worker(der, pin, "w") == WORKER.public
    with pytest.raises(AttestationError, match="not one of a worker"):
        check_worker(der_of(credentials_of(WORKER, "enclave")), pin, "w")
    for wrong in (None, b"", der[:-1], der + b"\0", bytes(link.MAX_CERTIFICATE_BYTES + 1)):
        with pytest.raises(AttestationError):
            check_worker(wrong, pin, "w")


def test_every_byte_of_a_leaf_counts() -> None:
    pin = WORKER.public.fingerprint
    der = der_of(credentials_of(WORKER, "worker"))
    for index in range(len(der)):
        changed = bytearray(der)
        changed[index] ^= 1
        with pytest.raises(AttestationError):
            check_worker(bytes(changed), pin, "w")


def test_a_leaf_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "_LIFETIME", datetime.timedelta(hours=-1))
    der = der_of(credentials_of(WORKER, "worker"))
    with pytest.raises(AttestationError, match=r"expired.*\nhint: start the worker again"):
        check_worker(der, WORKER.public.fingerprint, "w")


def test_credentials_go_through_a_pipe_and_show_no_secret() -> None:
    credentials = credentials_of(WORKER, "worker", allow=[LAB.public])
    assert Credentials.from_bytes(credentials.to_bytes()) == credentials
    assert credentials.password not in repr(credentials)
    assert "BEGIN ENCRYPTED PRIVATE KEY" in credentials.chain
    for data in (b"", b"[]", b"{}", b'{"chain": 1}', credentials.to_bytes()[:-1]):
        with pytest.raises(UsageError):
            Credentials.from_bytes(data)


def test_nothing_secret_is_in_the_worker_s_arguments_or_environment(running: Running) -> None:
    for pid in (running.process.pid, *_children(running.process.pid)):
        for name in ("cmdline", "environ"):
            data = Path(f"/proc/{pid}/{name}").read_bytes()
            assert b"PRIVATE KEY" not in data
            assert b"password" not in data


def _children(pid: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
