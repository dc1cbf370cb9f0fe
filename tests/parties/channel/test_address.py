"""Addresses of enclaves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obfuscatune.errors import UsageError
from obfuscatune.parties.channel.address import TlsAddress


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("tls://enclave-host:7100", TlsAddress("enclave-host", 7100)),
        ("tls://127.0.0.1:0", TlsAddress("127.0.0.1", 0)),
        ("tls://[::1]:65535", TlsAddress("::1", 65535)),
    ],
)
def test_parse(text: str, address: TlsAddress) -> None:
    assert TlsAddress.parse(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text", ["", "host:1", "tcp://host:1", "unix://x", "tls://", "tls://h", "tls://h:x", "tls://u@h:1", "tls://h:1/"]
)
def test_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"not an address of an enclave.*tls://HOST:PORT\nhint: "):
        TlsAddress.parse(text)


def test_port_range() -> None:
    with pytest.raises(UsageError, match=r"port out of range.*at tls://h:65536"):
        TlsAddress.parse("tls://h:65536")


@given(st.text() | st.text().map("tls://".__add__))
def test_any_text(text: str) -> None:
    try:
        address = TlsAddress.parse(text)
    except UsageError:
        return
    assert TlsAddress.parse(str(address)) == address


def test_nobody_answers_and_in_use() -> None:
    listener = TlsAddress("127.0.0.1", 0).listen()
    with listener:
        address = TlsAddress("127.0.0.1", listener.getsockname()[1])
        with pytest.raises(UsageError, match="address is in use"):
            address.listen()
    with pytest.raises(UsageError, match=rf"no enclave answers.*{address}"):
        address.connect(10)
