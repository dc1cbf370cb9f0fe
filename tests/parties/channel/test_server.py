"""The server and its clients: requests and errors, garbage, slow and many strangers, renewal, what the disk sees."""

import contextlib
import os
import queue
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from obfuscatune.errors import (
    AttestationError,
    ConnectionClosedError,
    ConsentError,
    ObfuscatuneError,
    ProtocolError,
    UsageError,
)
from obfuscatune.parties.attestation.evidence import Quote
from obfuscatune.parties.attestation.policy import Policy
from obfuscatune.parties.attestation.verify import judge
from obfuscatune.parties.channel import AttestedServer, connect_attested, fetch_evidence, frames, handshake, server, tls
from obfuscatune.parties.channel.address import TlsAddress
from obfuscatune.parties.identity import Identity

from .attackers import ANY, bare_client, certificate_of, soon, tls_end
from .conftest import Enclave
from .test_attacks import answer_to, greet


@pytest.fixture
def connect(owner: Identity, policy: Policy) -> Callable[..., Any]:
    def connect(enclave: Enclave, **options: Any) -> Any:
        return connect_attested(enclave.address, identity=owner, policy=policy, **{"timeout": 20, **options})

    return connect


def raw(enclave: Enclave) -> socket.socket:
    sock = TlsAddress.parse(enclave.address).connect(20)
    sock.settimeout(20)
    return sock


def ended(sock: socket.socket) -> bool:
    """Whether the server ends the connection, whatever it says before."""
    try:
        while sock.recv(4096):
            pass
    except ConnectionError:
        pass
    return True


# Requests


def test_requests_and_verdict(enclave: Enclave, owner: Identity, connect: Callable[..., Any]) -> None:
    with connect(enclave) as channel:
        assert channel.verdict.accepted
        assert channel.verdict.simulation
        assert channel.enclave == enclave.identity.public
        for number in range(3):
            payload = bytes([number]) * number
            assert channel.request({"n": number}, payload) == ({"echo": {"n": number}}, payload)
        whole = os.urandom(frames.MAX_PIECE_BYTES)
        assert channel.request({}, whole)[1] == whole
    assert [fields for _, fields, _ in enclave.handled] == [{"n": 0}, {"n": 1}, {"n": 2}, {}]
    assert {client for client, _, _ in enclave.handled} == {owner.public.fingerprint}


def test_errors_of_a_request_leave_the_channel_open(enclave: Enclave, connect: Callable[..., Any]) -> None:
    with connect(enclave) as channel:
        with pytest.raises(ConsentError, match=r"job is used up \(at tls://.*\)\nhint: make a new one"):
            channel.request({"op": "refuse"})
        with pytest.raises(ObfuscatuneError) as caught:
            channel.request({"op": "fail"})
        assert "canary" not in str(caught.value)
        with pytest.raises(UsageError, match="message is too long"):
            channel.request({}, bytes(frames.MAX_PIECE_BYTES + 1))
        assert channel.request({"op": "go on"})[0] == {"echo": {"op": "go on"}}


@pytest.mark.parametrize("reply", [({"x": "y" * 300_000}, b""), ({}, bytes(frames.MAX_PIECE_BYTES + 1)), ({1: 2}, b"")])
def test_a_reply_that_cannot_be_sent(reply: Any, start: Callable[..., Enclave], connect: Callable[..., Any]) -> None:
    replies = [({}, b""), reply]
    with connect(start(lambda *_: replies.pop())) as channel:
        with pytest.raises(ObfuscatuneError, match="reply is beyond the limits"):
            channel.request({})
        assert channel.request({}) == ({}, b"")


def test_several_threads_share_a_channel(enclave: Enclave, connect: Callable[..., Any]) -> None:
    results: list[bool] = []
    with connect(enclave) as channel:

        def ask(number: int) -> None:
            results.append(channel.request({"n": number}) == ({"echo": {"n": number}}, b""))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert results == [True] * 8


def test_parties_at_the_same_time(start: Callable[..., Enclave], connect: Callable[..., Any]) -> None:
    """One party's long request keeps no other waiting."""
    release = threading.Event()

    def handle(client: Any, fields: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes]:
        if fields["wait"] and not release.wait(20):
            raise UsageError("never released")
        return {"done": fields["wait"]}, b""

    enclave = start(handle)
    with connect(enclave) as slow, connect(enclave) as quick:
        replies: list[Any] = []
        thread = threading.Thread(target=lambda: replies.append(slow.request({"wait": True})[0]))
        thread.start()
        assert quick.request({"wait": False})[0] == {"done": False}
        release.set()
        thread.join(20)
    assert replies == [{"done": True}]


def test_a_late_reply_is_never_taken_for_the_next(start: Callable[..., Enclave], connect: Callable[..., Any]) -> None:
    release = threading.Event()

    def handle(*_: Any) -> tuple[dict[str, Any], bytes]:
        release.wait(20)
        return {"late": True}, b""

    with connect(start(handle)) as channel:
        with pytest.raises(ConnectionClosedError, match="too slow"):
            channel.request({}, timeout=0.05)
        release.set()
        with pytest.raises(ConnectionClosedError):
            channel.request({})


def test_a_reply_in_parts(start: Callable[..., Enclave], connect: Callable[..., Any]) -> None:
    """Each part is there before the next one is made; then the channel takes the next request."""
    taken = threading.Semaphore(0)

    def handle(client: Any, fields: dict[str, Any], payload: bytes) -> Any:
        for number in range(3):
            yield None
            yield {"n": number}, b"part"
            assert taken.acquire(timeout=20)
        if fields.get("fail"):
            raise UsageError("enough")
        return {"end": 1}, payload

    with connect(start(handle)) as channel:
        for _ in range(2):
            found = []
            for reply, data in channel.stream({}, b"x", most=4):
                found.append((reply, data))
                taken.release()
            assert found == [*(({"n": number}, b"part") for number in range(3)), ({"end": 1}, b"x")]
            taken.acquire()
        for _ in range(3):
            taken.release()
        with pytest.raises(UsageError, match="enough"):
            list(channel.stream({"fail": True}, most=4))
        for _ in range(3):
            taken.release()
        with pytest.raises(ProtocolError, match="too many parts"):
            list(channel.stream({}, most=3))
        with pytest.raises(ConnectionClosedError):
            channel.request({})


@pytest.mark.parametrize("silent", [True, False])
def test_who_leaves_a_reply_in_parts_ends_it(
    silent: bool, start: Callable[..., Enclave], connect: Callable[..., Any]
) -> None:
    ended = threading.Event()

    def handle(*_: Any) -> Any:
        try:
            yield {"n": 0}, b""
            while True:
                yield None if silent else ({"n": 1}, bytes(1 << 16))
        finally:
            ended.set()

    with connect(start(handle)) as channel:
        parts = channel.stream({}, most=1 << 30)
        assert next(parts) == ({"n": 0}, b"")
        assert not ended.is_set()
        parts.close()
        assert ended.wait(20)


def authenticated(stream: frames.Stream, owner: Identity) -> None:
    assert answer_to(stream, handshake.authenticate(owner, greet(stream))) == {"type": "accepted"}


@pytest.mark.parametrize(
    "message",
    [
        {"fields": {}, "id": 1},  # again
        {"fields": {}, "id": 0},
        {"fields": {}, "id": True},
        {"fields": {}, "id": "2"},
        {"fields": [], "id": 2},
        {"fields": {}},
        {"fields": {}, "id": 2, "more": 1},
    ],
)
def test_a_wrong_request_ends_the_connection(message: Any, enclave: Enclave, owner: Identity) -> None:
    with bare_client(enclave.address) as stream:
        authenticated(stream, owner)
        assert answer_to(stream, {"fields": {}, "id": 1}) == {"fields": {"echo": {}}, "id": 1}
        stream.send(message, limits=ANY, deadline=soon())
        with pytest.raises(ConnectionClosedError):
            stream.receive(ANY, deadline=soon())
    assert len(enclave.handled) == 1


@pytest.mark.parametrize(
    "reply",
    [
        {"fields": {}, "id": 2},
        {"fields": {}, "id": True},
        {"id": 1},
        {"fields": 1, "id": 1},
        {"error": "usage"},
        {"fields": {}, "id": 1, "more": 2},
        {"fields": {}, "id": 1, "more": True},
        {"error": "usage", "id": 1, "message": "", "more": 1},
    ],
)
def test_a_wrong_reply_ends_the_channel(
    reply: dict[str, Any], enclave: Enclave, owner: Identity, policy: Policy
) -> None:
    """An enclave that the policy accepts may still be wrong."""
    certificate = enclave.server._certificate

    def script(stream: frames.Stream) -> None:
        fields, _ = stream.receive(ANY, deadline=soon())
        evidence = fetch_evidence_as(enclave, fields["nonce"])
        stream.send(handshake.evidence_reply("00" * 32), evidence, limits=ANY, deadline=soon())
        for answer in ({"type": "accepted"}, reply):
            stream.receive(ANY, deadline=soon())
            stream.send(answer, limits=ANY, deadline=soon())
        stream.receive(ANY, deadline=soon())

    with (
        tls_end(tls.server_context(certificate), script) as address,
        connect_attested(address, identity=owner, policy=policy, timeout=20) as channel,
    ):
        with pytest.raises(ProtocolError, match="not the reply to this request"):
            channel.request({})
        with pytest.raises(ConnectionClosedError):
            channel.request({})


def fetch_evidence_as(enclave: Enclave, nonce: str) -> bytes:
    return fetch_evidence(enclave.address, nonce=nonce)[0].to_bytes()


# Anonymous evidence


def test_evidence_without_saying_who_asks(enclave: Enclave, policy: Policy) -> None:
    evidence, nonce = fetch_evidence(enclave.address)
    verdict = judge(evidence, policy, nonce=nonce)
    assert verdict.require().identity == enclave.identity.public
    assert fetch_evidence(enclave.address, nonce="ab" * 32)[1] == "ab" * 32
    assert fetch_evidence(enclave.address)[1] != nonce
    assert not judge(evidence, policy, nonce="ab" * 32).accepted
    for wrong in ("", "AB" * 32, "ab" * 31, "ab" * 32 + "\n"):
        with pytest.raises(UsageError, match="not a nonce"):
            fetch_evidence(enclave.address, nonce=wrong)


# TLS versions and other protocols


def test_an_enclave_with_tls_1_2_only_is_refused(enclave: Enclave, owner: Identity, policy: Policy) -> None:
    context = tls.server_context(enclave.server._certificate)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with tls_end(context, lambda stream: None) as address, pytest.raises(ProtocolError, match="TLS handshake failed"):
        connect_attested(address, identity=owner, policy=policy, timeout=20)


def client_with(minimum: ssl.TLSVersion, maximum: ssl.TLSVersion, alpn: list[str]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version, context.maximum_version = minimum, maximum
    context.set_alpn_protocols(alpn)
    return context


def test_a_client_with_tls_1_2_is_refused(enclave: Enclave, connect: Callable[..., Any]) -> None:
    context = client_with(ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2, [tls.ALPN])
    with raw(enclave) as sock, pytest.raises(ssl.SSLError):
        context.wrap_socket(sock)
    context = client_with(ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3, [tls.ALPN])
    with raw(enclave) as sock, context.wrap_socket(sock) as secured:  # the control: it may choose 1.3
        assert secured.version() == "TLSv1.3"
        assert not secured.session_reused
    connect(enclave).close()


@pytest.mark.parametrize("alpn", [[], ["http/1.1"]])
def test_another_protocol_over_tls_is_refused(
    alpn: list[str], enclave: Enclave, owner: Identity, policy: Policy, connect: Callable[..., Any]
) -> None:
    context = client_with(ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_3, alpn or ["x"])
    with raw(enclave) as sock, context.wrap_socket(sock) as secured:
        assert ended(secured)
    context = tls.server_context(enclave.server._certificate)
    context.set_alpn_protocols(alpn or ["x"])
    with tls_end(context, lambda stream: None) as address, pytest.raises(ProtocolError, match="another protocol"):
        connect_attested(address, identity=owner, policy=policy, timeout=20)
    connect(enclave).close()


@pytest.mark.parametrize("tickets", [0, 1])
def test_no_ticket_is_given(tickets: int, enclave: Enclave) -> None:
    """Nothing to resume by, so every connection shows a certificate; with one ticket the same look finds it."""
    context = tls.server_context(enclave.server._certificate)
    assert context.num_tickets == 0
    context.num_tickets = tickets

    def script(stream: frames.Stream) -> None:
        stream.send({}, limits=ANY, deadline=soon())
        stream.receive(ANY, deadline=soon())

    with tls_end(context, script) as address, bare_client(address) as stream:
        stream.receive(ANY, deadline=soon())
        session = stream._socket.session  # type: ignore[attr-defined]
        assert (session is not None and session.has_ticket) is bool(tickets)


def test_what_is_no_tls_is_refused(owner: Identity, policy: Policy) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            accepted, _ = listener.accept()
            with accepted:
                accepted.recv(10)
                accepted.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        address = f"tls://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ProtocolError, match="TLS handshake failed"):
            connect_attested(address, identity=owner, policy=policy, timeout=20)
        thread.join(20)
    with pytest.raises(UsageError, match="no enclave answers"):
        connect_attested(address, identity=owner, policy=policy, timeout=20)


def test_a_silent_peer_is_left(owner: Identity, policy: Policy) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"tls://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ConnectionClosedError, match="TLS handshake failed: got timeout"):
            connect_attested(address, identity=owner, policy=policy, timeout=0.1)


@pytest.mark.parametrize("resets", [False, True])
def test_a_forwarder_with_nothing_behind_it_is_an_enclave_that_is_away(
    owner: Identity, policy: Policy, resets: bool
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def forward() -> None:
            accepted, _ = listener.accept()
            with accepted:
                accepted.recv(10_000)
                if resets:
                    accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        thread = threading.Thread(target=forward)
        thread.start()
        address = f"tls://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ConnectionClosedError, match="TLS handshake failed"):
            connect_attested(address, identity=owner, policy=policy, timeout=20)
        thread.join(20)


# Garbage, slow and many strangers


def test_garbage_before_the_handshake(enclave: Enclave, connect: Callable[..., Any]) -> None:
    greeting = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"  # the head of a ClientHello
    for data in (b"", b"\0", b"GET / HTTP/1.1\r\n\r\n", os.urandom(5000), greeting, greeting + os.urandom(600)):
        with raw(enclave) as sock:
            with contextlib.suppress(OSError):  # the server may be quicker
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
            assert ended(sock)
    connect(enclave).close()
    assert enclave.handled == []


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    message=st.binary(max_size=100)
    | st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=4)
)
def test_garbage_after_the_handshake(message: Any, enclave: Enclave) -> None:
    with bare_client(enclave.address) as stream:
        secured: Any = stream._socket
        if isinstance(message, bytes):
            with contextlib.suppress(OSError):  # the server may be quicker
                secured.sendall(message)
                socket.socket.shutdown(secured, socket.SHUT_WR)
        else:
            try:
                stream.send(message, limits=ANY, deadline=soon())
            except UsageError:  # an integer that has no canonical form
                return
        with pytest.raises(ProtocolError):
            fields, _ = stream.receive(ANY, deadline=soon())
            assert fields["error"] == "protocol"
            stream.receive(ANY, deadline=soon())
    assert enclave.handled == []


def test_an_oversized_hello_is_refused_before_it_is_read(
    enclave: Enclave, connect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger is told nothing; what the operator's log says of it is the reason."""
    refused: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr(server.logger, "warning", lambda text, error: refused.put(str(error)))
    with bare_client(enclave.address) as stream:
        secured: Any = stream._socket
        secured.sendall((frames.HELLO.fields + 1).to_bytes(4, "little"))
        with pytest.raises(ConnectionClosedError):
            stream.receive(ANY, deadline=soon())
    assert "fields too long" in refused.get(timeout=20)
    with bare_client(enclave.address) as stream:  # a session's limits are no stranger's
        greet(stream)
        with contextlib.suppress(ConnectionClosedError):  # the server may be quicker
            stream.send({"x": "y" * frames.AUTHENTICATE.fields}, limits=ANY, deadline=soon())
            stream.receive(ANY, deadline=soon())
    assert "fields too long" in refused.get(timeout=20)
    connect(enclave).close()


@pytest.mark.parametrize("where", ["before TLS", "before the hello", "before the signature"])
def test_a_slow_stranger_is_left(where: str, start: Callable[..., Enclave]) -> None:
    enclave = start(timeout=0.5)
    if where == "before TLS":
        with raw(enclave) as sock:
            assert ended(sock)
    else:
        with pytest.raises((ConnectionClosedError, OSError)), bare_client(enclave.address) as stream:
            if where == "before the signature":
                greet(stream)
            stream.receive(ANY, deadline=soon())


def test_an_idle_party_is_left(start: Callable[..., Enclave], connect: Callable[..., Any]) -> None:
    with connect(start(idle_timeout=0.05)) as channel, pytest.raises(ConnectionClosedError):
        channel._stream.receive(ANY, deadline=soon())


def test_close_ends_connections_and_may_come_twice(start: Callable[..., Enclave], connect: Callable[..., Any]) -> None:
    enclave = start()
    with connect(enclave) as channel:
        enclave.server.close()
        with pytest.raises(ConnectionClosedError):
            channel.request({})
    enclave.server.close()
    with pytest.raises(UsageError, match="no enclave answers"):
        fetch_evidence(enclave.address)


# Who may come in


@pytest.mark.parametrize("allow", [lambda client: None, lambda client: "yes", lambda client: [][0]])
def test_only_a_plain_yes_lets_a_client_in(
    allow: Callable[..., Any], start: Callable[..., Enclave], connect: Callable[..., Any]
) -> None:
    enclave = start(allow=allow)
    with pytest.raises((ConsentError, ConnectionClosedError)):
        connect(enclave)
    assert enclave.handled == []


# The certificate: renewed, and nowhere on the disk in plain


def test_the_certificate_is_made_again(
    enclave: Enclave, connect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = certificate_of(enclave.address)
    assert certificate_of(enclave.address) == first
    with connect(enclave) as before:
        monkeypatch.setattr(server, "_RENEWAL_SECONDS", -1.0)
        second = certificate_of(enclave.address)
        assert second != first
        with connect(enclave) as after:
            assert after.enclave == before.enclave
            assert before.request({})[0] == {"echo": {}}


def test_the_server_survives_an_attester_that_fails(
    start: Callable[..., Enclave], connect: Callable[..., Any], platform: Any
) -> None:
    class Flaky:
        works = True

        def quote(self, report_data: bytes) -> Quote:
            if not self.works:
                raise AttestationError("no quote to have")
            quote: Quote = platform.attester.quote(report_data)
            return quote

    attester = Flaky()
    enclave = start(attester=attester)
    attester.works = False
    with pytest.raises(ProtocolError, match="peer refuses the hello"):
        connect(enclave)
    enclave.server._made -= 3600
    with pytest.raises(ProtocolError):
        connect(enclave)
    with pytest.raises(AttestationError, match="no quote to have"):
        AttestedServer(
            "tls://127.0.0.1:0", identity=enclave.identity, attester=attester, allow=lambda c: True, handle=print
        )
    attester.works = True
    connect(enclave).close()


def test_the_tls_key_is_never_on_the_disk_in_plain(
    start: Callable[..., Enclave], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[bytes] = []
    real = Path.write_bytes
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(Path, "write_bytes", lambda path, data: written.append(data) or real(path, data))
    enclave = start()
    assert len(written) == 1
    assert b"BEGIN ENCRYPTED PRIVATE KEY" in written[0]
    assert b"BEGIN PRIVATE KEY" not in written[0]
    assert b"BEGIN EC PRIVATE KEY" not in written[0]
    assert list(tmp_path.iterdir()) == []
    assert "private" not in repr(enclave.server._certificate)


def test_no_secrets_for_the_one_who_sets_the_environment(
    start: Callable[..., Enclave], connect: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "keys"
    monkeypatch.setenv("SSLKEYLOGFILE", str(log))
    assert ssl.create_default_context().keylog_filename == str(log)  # the control: the library would
    log.unlink(missing_ok=True)
    connect(start()).close()
    assert not log.exists()
