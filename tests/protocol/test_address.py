"""Addresses, listeners and what stands in their way."""

import os
import socket
import stat
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obfuscatune.errors import UsageError
from obfuscatune.protocol.address import Address, address_of, close_listener, connect, listen

PIN = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:///run/worker.sock", Address(path="/run/worker.sock")),
        ("unix://worker.sock", Address(path="worker.sock")),
        ("tcp://gpu-host:7000", Address(host="gpu-host", port=7000)),
        ("tcp://127.0.0.1:0", Address(host="127.0.0.1", port=0)),
        ("tcp://[::1]:65535", Address(host="::1", port=65535)),
        ("tls://0.0.0.0:7000", Address(host="0.0.0.0", port=7000, tls=True)),  # noqa: S104 - nobody listens
        (f"tls://gpu-host:7000#{PIN}", Address(host="gpu-host", port=7000, tls=True, fingerprint=PIN)),
        (f"tls://[::1]:1#{PIN}", Address(host="::1", port=1, tls=True, fingerprint=PIN)),
        ("tcp://[fe80::1%eth0]:1", Address(host="fe80::1%eth0", port=1)),
    ],
)
def test_parse(text: str, address: Address) -> None:
    assert Address.parse(text) == address
    assert str(address) == text


@pytest.mark.parametrize("mark", ["", "x", PIN[:-1], PIN + "0", PIN.upper(), PIN[:-1] + "g", PIN + "#", " " + PIN[1:]])
def test_a_fingerprint_is_64_digits(mark: str) -> None:
    with pytest.raises(UsageError, match=r"not a fingerprint.*\nhint: "):
        Address.parse(f"tls://gpu-host:7000#{mark}")


@pytest.mark.parametrize(
    ("text", "local"),
    [
        ("unix://w", True),
        ("tcp://localhost:1", True),
        ("tcp://127.0.0.1:1", True),
        ("tcp://127.3.2.1:1", True),
        ("tcp://[::1]:1", True),
        ("tcp://[::ffff:127.0.0.1]:1", True),
        ("tcp://[::ffff:10.0.0.1]:1", False),
        ("tcp://0.0.0.0:1", False),
        ("tcp://[::]:1", False),
        ("tcp://10.0.0.1:1", False),
        ("tcp://gpu-host:1", False),
        ("tcp://localhost.example.org:1", False),
        ("tls://10.0.0.1:1", False),
    ],
)
def test_plain_tcp_stays_on_this_machine(text: str, local: bool) -> None:
    address = Address.parse(text)
    assert address.is_local is local
    address.check_exposure(True, "--insecure")
    if local or address.tls:
        address.check_exposure(False, "--insecure")
        return
    with pytest.raises(UsageError, match=r"neither encrypted nor authenticated.*--insecure.*\n.*reads keyed weights"):
        address.check_exposure(False, "--insecure")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "gpu-host:7000",
        "http://gpu-host:7000",
        "unix:/run/worker.sock",
        "unix://",
        "unix://a\0b",
        "tcp://",
        "tcp://gpu-host",
        "tcp://gpu-host:",
        "tcp://:7000",
        "tcp://gpu-host:x",
        "tcp://gpu-host:-1",
        "tcp://gpu-host:70 00",
        "tcp://gpu-host:7000/",
        "tcp://user@gpu-host:7000",
        "tcp://::1:7000",
        "tcp://[::1]",
        "tcp://[::1:7000",
        "tcp://gpu-host:\u0661",
        "tls://",
        f"tcp://gpu-host:7000#{PIN}",
        f"tls:///path#{PIN}",
    ],
)
def test_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"not an address.*\nhint: "):
        Address.parse(text)


def test_port_range() -> None:
    with pytest.raises(UsageError, match="port out of range: got 65536, expected 0 to 65535"):
        Address.parse("tcp://h:65536")


def test_path_length() -> None:
    assert Address.parse("unix://" + "a" * 107).path == "a" * 107
    for path in ("a" * 108, "é" * 54):
        with pytest.raises(UsageError, match="too long: got 108 bytes, expected at most 107"):
            Address.parse("unix://" + path)


@given(st.text() | st.text().map("tcp://".__add__) | st.text().map("unix://".__add__))
def test_parse_any_text(text: str) -> None:
    try:
        address = Address.parse(text)
    except UsageError:
        return
    assert Address.parse(str(address)) == address


def exchange(listener: socket.socket, address: Address) -> None:
    with connect(address, timeout=10) as client:
        server, _ = listener.accept()
        with server:
            server.sendall(b"x")
            assert client.recv(1) == b"x"
            assert client.gettimeout() is None


def test_tcp() -> None:
    listener = listen(Address.parse("tcp://127.0.0.1:0"))
    with closing(listener):
        address = address_of(listener)
        assert address.port > 0
        exchange(listener, address)
        with pytest.raises(UsageError, match=rf"address is in use \(at tcp://127.0.0.1:{address.port}\)\nhint: "):
            listen(address)
    with pytest.raises(UsageError) as caught:
        connect(address, timeout=10)
    assert "no worker answers" in str(caught.value)
    assert f"obfuscatune worker --listen {address}" in str(caught.value)
    again = listen(address)  # at once, although connections of the old one linger
    close_listener(again, address)
    close_listener(again, address)


def test_ipv6() -> None:
    try:
        listener = listen(Address.parse("tcp://[::1]:0"))
    except UsageError:
        pytest.skip("this machine has no IPv6 loopback")
    with closing(listener):
        exchange(listener, address_of(listener))


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_unix(tmp_path: Path, umask: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # pytest's own path may be longer than a socket's
    address = Address.parse("unix://w.sock")
    before = os.umask(umask)
    try:
        listener = listen(address)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat("w.sock").st_mode) == 0o600
    assert address_of(listener) == address
    exchange(listener, address)
    close_listener(listener, address)
    assert not os.path.lexists("w.sock")
    close_listener(listener, address)
    with pytest.raises(UsageError, match="no worker answers"):
        connect(address, timeout=10)


def test_closing_twice_removes_no_other_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    address = Address.parse("unix://w.sock")
    first = listen(address)
    close_listener(first, address)
    second = listen(address)
    close_listener(first, address)
    exchange(second, address)
    close_listener(second, address)


def test_live_socket_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    address = Address.parse("unix://w.sock")
    listener = listen(address)
    with pytest.raises(UsageError, match=r"address is in use \(at unix://w.sock\)\nhint: "):
        listen(address)
    listener.accept()[0].close()  # the question whether anybody listens
    exchange(listener, address)
    close_listener(listener, address)


def test_stale_socket_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    address = Address.parse("unix://w.sock")
    listen(address).close()  # as a process that is killed: the file stays
    with pytest.raises(UsageError, match="no worker answers: got Connection refused"):
        connect(address, timeout=10)
    listener = listen(address)
    exchange(listener, address)
    close_listener(listener, address)


def test_other_files_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("w.sock").write_text("precious")
    with pytest.raises(UsageError, match="address is in use"):
        listen(Address.parse("unix://w.sock"))
    assert Path("w.sock").read_text() == "precious"


@pytest.mark.parametrize("text", ["unix://missing/w.sock", "tcp://192.0.2.1:7000"])
def test_cannot_listen(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="cannot listen"):
        listen(Address.parse(text))
