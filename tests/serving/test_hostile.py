"""Clients that mean harm, on a raw socket: refused, nothing leaked, and the next good client is answered."""

import contextlib
import json
import select
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import httpx2
import openai
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PrivateFormat

from obfuscatune.serving.limits import ServerLimits
from obfuscatune.serving.text import Text

from .conftest import TOKEN, Running, serving

AUTH = f"Authorization: Bearer {TOKEN}\r\n"
HOST = "Host: 127.0.0.1\r\n"


@pytest.fixture(scope="module")
def small(open_served) -> Iterator[Running]:
    """A server with little patience."""
    limits = ServerLimits(
        head_seconds=0.5, body_seconds=0.5, send_seconds=0.5, body_bytes=4096, header_bytes=8192, connections=40
    )
    with serving(open_served("balanced"), limits) as running:
        yield running
        assert running.openai.completions.create(model="base", prompt="well?", max_tokens=2).choices


def read_all(connection: socket.socket, seconds: float = 10) -> bytes:
    """What comes until the server closes; fails if it does not."""
    found, deadline = b"", time.monotonic() + seconds
    with contextlib.suppress(ConnectionError):
        while True:
            assert select.select([connection], [], [], max(0, deadline - time.monotonic()))[0], found
            piece = connection.recv(65536)
            if not piece:
                break
            found += piece
    return found


def send(server: Running, request: str | bytes) -> bytes:
    with server.connect() as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(request.encode() if isinstance(request, str) else request)
        return read_all(connection)


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/v1/protection", "/v1/chat/completions", "/nothing"])
@pytest.mark.parametrize("token", [None, "wrong", TOKEN[:-1], TOKEN + "x", TOKEN.upper()])
def test_wrong_tokens_get_nothing(small: Running, path: str, token: str | None) -> None:
    reply = small.get(path, token=token)
    assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
    assert reply.headers["connection"] == "close"


@pytest.mark.parametrize(
    "lines",
    [
        "Authorization: Bearer",
        "Authorization: Basic " + TOKEN,
        "Authorization: " + TOKEN,
        f"{AUTH}Authorization: Bearer wrong",
        f"X-Api-Key: {TOKEN}",
        f"Cookie: token={TOKEN}",
    ],
)
def test_a_token_elsewhere_is_none(small: Running, lines: str) -> None:
    assert status(send(small, f"GET /v1/models HTTP/1.1\r\n{HOST}{lines}\r\n\r\n")) == 401


def test_a_token_is_not_taken_from_the_address(small: Running) -> None:
    assert small.get(f"/v1/models?token={TOKEN}&api_key={TOKEN}", token=None).status_code == 401


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "evil.example:80", "", "127.0.0.1@evil"])
def test_another_hosts_name_is_refused(small: Running, host: str) -> None:
    # DNS rebinding: a page of evil.example asks a server on this machine, by a name of its own.
    assert status(send(small, f"GET /health HTTP/1.1\r\nHost: {host}\r\n\r\n")) == 421


@pytest.mark.parametrize(
    "request_text",
    [
        f"POST /v1/completions HTTP/1.1\r\n{HOST}{AUTH}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
        f"POST /v1/completions HTTP/1.1\r\n{HOST}{AUTH}Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        f"POST /v1/completions HTTP/1.1\r\n{HOST}{AUTH}Content-Length: +5\r\n\r\nhello",
        f"POST /v1/completions HTTP/1.1\r\n{HOST}{AUTH}Content-Length: -5\r\n\r\nhello",
        f"POST /v1/completions HTTP/1.1\r\n{HOST}{AUTH}Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        f"POST /v1/completions HTTP/1.1\r\n{HOST}{AUTH}Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        f"POST /v1/completions HTTP/1.1\r\n{HOST}{AUTH}Transfer-Encoding: chunked\r\n\r\nffffffffffffffffffffff\r\n",
        f"POST /v1/completions HTTP/1.1\r\n{HOST}{AUTH}Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        f"POST /v1/completions HTTP/1.1\r\n{HOST}{AUTH}Transfer-Encoding: chunked\r\n\r\n0_5\r\nhello\r\n",
        f"POST /v1/completions HTTP/1.1\r\n{HOST}{AUTH}Transfer-Encoding:\r\n chunked\r\nContent-Length: 5\r\n\r\n0",
        f"GET /health HTTP/1.1\r\n{HOST}{HOST}\r\n",
        f"GET /health HTTP/1.1\r\n{HOST} folded: x\r\n\r\n",
        f"GET /health HTTP/1.1\r\n{HOST}A: b\x00c\r\n\r\n",
        f"GET /health HTTP/9.9\r\n{HOST}\r\n",
        f"GET  /health HTTP/1.1\r\n{HOST}\r\n",
        "GET /health HTTP/1.1\r\n\r\n",
        "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 no TLS here\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_requests_of_two_meanings_are_refused(
    small: Running, request_text: str, caplog: pytest.LogCaptureFixture
) -> None:
    answer = send(small, request_text + f"GET /v1/models HTTP/1.1\r\n{HOST}{AUTH}\r\n")
    assert status(answer) in (400, 413, 415, 421, 501, 505)
    assert b"owned_by" not in answer  # what is behind it is no second request
    assert answer.count(b"HTTP/1.1 ") == 1
    assert not caplog.records  # whoever sends them fills no log


@pytest.mark.parametrize("rest", ["ZZZ\r\n", "-5\r\n", f"5;{'x' * 9000}\r\n", "3\r\nlonger\r\n"])
def test_a_body_that_breaks_behind_its_answer_ends_the_connection(
    small: Running, rest: str, caplog: pytest.LogCaptureFixture
) -> None:
    with small.connect() as connection:
        connection.sendall(f"POST /no HTTP/1.1\r\n{HOST}{AUTH}Transfer-Encoding: chunked\r\n\r\n".encode())
        assert status(connection.recv(65536)) == 404  # which did not wait for it
        connection.sendall(rest.encode() + f"\r\nGET /v1/models HTTP/1.1\r\n{HOST}{AUTH}\r\n".encode())
        assert b"owned_by" not in read_all(connection)
    assert not caplog.records


def test_huge_headers_and_bodies_are_refused_before_they_are_read(small: Running) -> None:
    assert status(send(small, f"GET /health HTTP/1.1\r\n{HOST}X: {'x' * 100_000}\r\n\r\n")) in (0, 400, 431)
    assert status(send(small, f"GET /{'x' * 100_000} HTTP/1.1\r\n{HOST}\r\n")) in (0, 400, 431)
    many = "".join(f"X{number}: y\r\n" for number in range(5000))
    assert status(send(small, f"GET /health HTTP/1.1\r\n{HOST}{many}\r\n")) in (0, 400, 431)
    post = f"POST /v1/completions HTTP/1.1\r\n{HOST}{AUTH}"
    assert status(send(small, f"{post}Content-Length: 99999999999999999999\r\n\r\n")) == 413
    assert status(send(small, f"{post}Content-Length: 5000\r\n\r\n")) == 413
    chunks = "400\r\n" + "x" * 1024 + "\r\n"
    assert status(send(small, f"{post}Transfer-Encoding: chunked\r\n\r\n" + chunks * 8)) in (0, 413)
    with pytest.raises(openai.APIStatusError) as caught:
        small.openai.completions.create(model="base", prompt="x" * 5000)
    assert caught.value.status_code == 413


def test_slow_clients_are_cut_off(small: Running) -> None:
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(small.connect()) for _ in range(6)]
        heads = ["", "GET", f"GET /health HTTP/1.1\r\n{HOST}X: ", f"GET /health HTTP/1.1\r\n{HOST}"]
        post = f"POST /v1/completions HTTP/1.1\r\n{HOST}{AUTH}"
        heads += [f'{post}Content-Length: 50\r\n\r\n{{"model"', f"{post}Transfer-Encoding: chunked\r\n\r\n5\r\nhe"]
        for connection, head in zip(slow, heads, strict=True):
            connection.sendall(head.encode())
        answers = [status(read_all(connection)) for connection in slow]
    assert answers == [0, 0, 0, 0, 408, 408]
    assert time.monotonic() - started < 8


def test_a_client_that_drips_headers_is_cut_off(small: Running) -> None:
    with small.connect() as connection, pytest.raises(ConnectionError):
        for _ in range(200):  # a byte at a time does not move the end
            connection.sendall(b"X")
            if select.select([connection], [], [], 0.05)[0] and not connection.recv(1):
                raise ConnectionError


def test_a_client_that_reads_no_answer_is_cut_off(small: Running) -> None:
    requests = f"GET /page.js HTTP/1.1\r\n{HOST}\r\n".encode() * 1000
    deadline = time.monotonic() + 20
    with small.connect() as connection, pytest.raises(ConnectionError):
        connection.setblocking(False)
        while time.monotonic() < deadline:  # until no buffer on the way takes more, and then the connection ends
            if select.select([], [connection], [], 0.05)[1]:
                connection.send(requests)


def test_200_connections_do_not_keep_a_client_out_for_long(small: Running) -> None:
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(small.connect()) for _ in range(200)]
        for connection in idle:
            with contextlib.suppress(ConnectionError):
                connection.sendall(b"GET ")
        for connection in idle:
            read_all(connection)
    assert small.get("/health", token=None).status_code == 200


def test_connections_that_never_begin_tls_end_soon(open_served, tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(1), now + timedelta(1))
    address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    pem = certificate.add_extension(address, critical=False).sign(key, SHA256()).public_bytes(Encoding.PEM)
    (tmp_path / "cert.pem").write_bytes(pem)
    (tmp_path / "key.pem").write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    files = {"certificate": str(tmp_path / "cert.pem"), "key": str(tmp_path / "key.pem")}
    limits = ServerLimits(head_seconds=1, connections=20)
    trusted = ssl.create_default_context(cafile=files["certificate"])
    with serving(open_served("balanced"), limits, tls=files) as server, contextlib.ExitStack() as stack:

        def health() -> int:
            return httpx2.get(f"https://127.0.0.1:{server.port}/health", verify=trusted, timeout=5).status_code

        assert health() == 200
        silent = [stack.enter_context(server.connect()) for _ in range(60)]
        for connection in silent[:5]:
            connection.sendall(b"GET / HTTP/1.1\r\n\r\n")  # which is no TLS
        started = time.monotonic()
        # Above twice the limit there is nothing at once, and the others end in their time.
        closed = [read_all(connection, 5) for connection in silent]
        assert not any(b"HTTP" in answer for answer in closed)
        assert time.monotonic() - started < 5
        assert health() == 200


@pytest.mark.parametrize(
    ("version", "headers", "code"),
    [
        ("1.1", "Content-Length: {length}\r\nTransfer-Encoding: chunked", 400),
        ("1.1", "Transfer-Encoding: chunked\r\nContent-Length: 0", 400),
        ("1.0", "Transfer-Encoding: chunked", 400),
        ("1.1", "Content-Length: {length}\r\nContent-Encoding: gzip", 415),
        ("1.1", 'Content-Length: {length}\r\nContent-Type: application/json; Charset = "utf-16"', 415),
        ("1.1", "Content-Length: {length}\r\nContent-Type: a; charset=utf-8\r\nContent-Type: a; charset=utf-7", 415),
        ("1.1", "Transfer-Encoding: chunked", 200),
        ("1.1", "Content-Length: {length}\r\nContent-Type: text/plain\r\nContent-Encoding: identity", 200),
        ("1.1", "Content-Length: {length}\r\nContent-Type: application/json;charset=UTF-8", 200),
        ("1.1", 'Content-Length: {length}\r\nContent-Type: application/json; charset="utf8"', 200),
    ],
)
def test_a_good_body_of_two_readings_is_refused(small: Running, version: str, headers: str, code: int) -> None:
    """By its length, or as a proxy may unpack or decode it."""
    body = '{"model": "base", "prompt": "x", "max_tokens": 1}'
    if "chunked" in headers:
        body = f"{len(body):x}\r\n{body}\r\n0\r\n\r\n"
    line = f"POST /v1/completions HTTP/{version}\r\n{HOST}{AUTH}Connection: close\r\n"
    assert status(send(small, f"{line}{headers.format(length=len(body))}\r\n\r\n{body}")) == code


def test_head_is_get_without_a_body(small: Running) -> None:
    for path in ("/", "/health", "/v1/models", "/v1/models/base", "/metrics"):
        answer = send(small, f"HEAD {path} HTTP/1.1\r\n{HOST}{AUTH}Connection: close\r\n\r\n")
        assert status(answer) == 200 and answer.endswith(b"\r\n\r\n"), path
    assert status(send(small, f"HEAD /v1/models HTTP/1.1\r\n{HOST}\r\n")) == 401


def test_an_address_in_full_is_the_same_as_its_path(small: Running) -> None:
    for method, path, code in (("GET", "/v1/models", 200), ("GET", "/health", 200), ("POST", "/health", 405)):
        line = f"{method} http://127.0.0.1:{small.port}{path} HTTP/1.1\r\n{HOST}{AUTH}Connection: close\r\n\r\n"
        assert status(send(small, line)) == code
    line = f"GET http://127.0.0.1:{small.port}/v1/models HTTP/1.1\r\n"
    assert status(send(small, f"{line}{HOST}\r\n")) == 401
    assert status(send(small, f"{line}Host: evil\r\n{AUTH}\r\n")) == 421


@pytest.mark.parametrize(
    "path",
    [
        *("/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//v1/models", "/page.js/../app.py", "/page/index.html"),
        *("/health/", "/health;x", "/health%3fx", "/health#x", "/%ff%fe", "/\\..\\v1\\models", "*"),
        *("/v1/models/", "/v1//models", "/v1/models%00", "/V1/models", "/static/app.py", "http://evil/v1/models"),
    ],
)
def test_path_tricks_lead_nowhere(small: Running, path: str) -> None:
    answer = send(small, f"GET {path} HTTP/1.1\r\n{HOST}{AUTH}Connection: close\r\n\r\n")
    assert status(answer) in (400, 404)
    assert b"root:" not in answer and b"import" not in answer
    # And none of them is let in without a token.
    assert status(send(small, f"GET {path} HTTP/1.1\r\n{HOST}\r\n")) in (400, 401)


def test_another_sites_page_may_not_ask(small: Running) -> None:
    request = f"OPTIONS /v1/completions HTTP/1.1\r\n{HOST}{AUTH}Origin: http://evil.example\r\n"
    answer = send(small, f"{request}Access-Control-Request-Method: POST\r\nConnection: close\r\n\r\n")
    assert status(answer) == 405
    assert b"access-control" not in answer.lower()


def test_nothing_of_a_prompt_is_logged(small: Running, caplog: pytest.LogCaptureFixture, capfd) -> None:
    caplog.set_level(0)
    bodies = [
        {"model": "base", "prompt": "quokka", "max_tokens": 3},
        {"model": "base", "prompt": "quokka" * 100},
        {"model": "base", "prompt": ["quokka"]},
        {"model": "quokka", "prompt": "quokka"},
        {"quokka": "quokka", "prompt": "quokka", "model": "base"},
    ]
    for body in bodies:
        small.post("/v1/completions", body)
        messages = [{"role": "user", "content": body["prompt"]}]
        small.post("/v1/chat/completions", {**body, "prompt": None, "messages": messages})
    small.post("/v1/completions", json.dumps(bodies[0])[:-1].encode())
    out, err = capfd.readouterr()
    assert "quokka" not in out + err
    ours = [r for r in caplog.records if not r.name.startswith(("openai", "httpx", "httpcore"))]
    assert not [record for record in ours if "quokka" in record.getMessage()]


def test_nothing_of_an_answer_is_logged_by_asyncio_s_debug_mode(
    open_served, monkeypatch: pytest.MonkeyPatch, verbose: Callable[[], str]
) -> None:
    monkeypatch.setattr(Text, "push", lambda self, token: "wombat")
    with serving(open_served("balanced"), ServerLimits()) as server:
        for stream in (False, True):
            body = {"model": "base", "prompt": "quokka", "max_tokens": 3, "stream": stream}
            assert server.post("/v1/completions", body).status_code == 200
            chat = {**body, "prompt": None, "messages": [{"role": "user", "content": "quokka"}]}
            reply = server.post("/v1/chat/completions", chat)
            assert reply.status_code == 200 and ("wombat" in reply.text or not stream)
        said = verbose()
    assert "Executing <Handle" in said and "quokka" not in said and "wombat" not in said
