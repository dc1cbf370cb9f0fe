"""Files in pieces: whole, empty, broken off, longer and shorter than said."""

import io
from collections.abc import Callable
from typing import Any

import pytest

from obfuscatune.errors import ObfuscatuneError, ProtocolError, UsageError
from obfuscatune.parties.attestation.policy import Policy
from obfuscatune.parties.channel import Piece, connect_attested, download, serve_piece, transfer, upload
from obfuscatune.parties.identity import Identity

from .conftest import Enclave


class Store:
    """One file in the enclave."""

    def __init__(self, content: bytes = b"", fail_at: int | None = None) -> None:
        self.content, self.fail_at = bytearray(content), fail_at

    def handle(self, client: Any, fields: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        if fields["op"] == "get":
            return serve_piece(fields, io.BytesIO(self.content), len(self.content))
        piece = Piece.of(fields, data, max_bytes=1000)
        if piece.offset == self.fail_at:
            self.fail_at = None
            raise ObfuscatuneError("disk is full")
        if piece.offset != len(self.content):
            raise UsageError("pieces out of order", got=piece.offset, expected=len(self.content))
        self.content += piece.data
        return {"complete": piece.is_last}, b""


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "MAX_PIECE_BYTES", 100)


@pytest.fixture
def open_store(start: Callable[..., Enclave], owner: Identity, policy: Policy) -> Callable[[Store], Any]:
    return lambda store: connect_attested(start(store.handle).address, identity=owner, policy=policy, timeout=20)


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 250, 1000])
def test_there_and_back(size: int, open_store: Callable[[Store], Any]) -> None:
    content = bytes(number % 251 for number in range(size))
    store, target, steps = Store(), io.BytesIO(), []
    with open_store(store) as channel:
        assert upload(channel, {"op": "put"}, io.BytesIO(content), size, progress=steps.append) == {"complete": True}
        assert store.content == content
        assert sum(steps) == size
        assert download(channel, {"op": "get"}, target, max_bytes=1000) == size
    assert target.getvalue() == content


def test_a_broken_upload_goes_on(open_store: Callable[[Store], Any]) -> None:
    content, store = bytes(range(250)), Store(fail_at=200)
    with open_store(store) as channel:
        with pytest.raises(ObfuscatuneError, match="disk is full"):
            upload(channel, {"op": "put"}, io.BytesIO(content), 250)
        assert upload(channel, {"op": "put"}, io.BytesIO(content), 250, start=200) == {"complete": True}
    assert store.content == content


def test_a_file_too_long_or_shorter_than_said(open_store: Callable[[Store], Any]) -> None:
    with open_store(Store()) as channel:
        with pytest.raises(UsageError, match="file is too long: got 1001 bytes, expected at most 1000"):
            upload(channel, {"op": "put"}, io.BytesIO(bytes(1001)), 1001)
        with pytest.raises(UsageError, match="became shorter"):
            upload(channel, {"op": "put"}, io.BytesIO(bytes(150)), 160)


@pytest.mark.parametrize(
    ("fields", "data"),
    [
        ({}, b""),
        ({"offset": 0}, b""),
        ({"offset": -1, "size": 10}, b"x"),
        ({"offset": True, "size": 10}, b"x"),
        ({"offset": 0, "size": 10.0}, b"x"),
        ({"offset": 9, "size": 10}, b"xx"),
        ({"offset": 11, "size": 10}, b"x"),
        ({"offset": 3, "size": 10}, b""),
        ({"offset": 0, "size": 1001}, b"x"),
        ({"offset": 2**63, "size": 10}, b"x"),
    ],
)
def test_wrong_pieces(fields: dict[str, Any], data: bytes) -> None:
    with pytest.raises(UsageError):
        Piece.of(fields, data, max_bytes=1000)


@pytest.mark.parametrize("offset", [None, -1, 11, "0", True, 2**63])
def test_wrong_offsets(offset: Any) -> None:
    with pytest.raises(UsageError, match="offset"):
        serve_piece({"offset": offset}, io.BytesIO(bytes(10)), 10)


@pytest.mark.parametrize(
    "replies",
    [
        [({}, b"")],
        [({"size": -1}, b"")],
        [({"size": 1001}, b"x")],
        [({"size": 10}, b"")],
        [({"size": 10}, bytes(11))],
        [({"size": 10}, b"x"), ({"size": 20}, b"x")],
        [({"size": True}, b"x")],
    ],
)
def test_an_enclave_that_sends_no_file(
    replies: list[Any], start: Callable[..., Enclave], owner: Identity, policy: Policy
) -> None:
    pending = iter(replies)
    enclave = start(lambda *_: next(pending))
    connected = connect_attested(enclave.address, identity=owner, policy=policy, timeout=20)
    with connected as channel, pytest.raises(ProtocolError):
        download(channel, {"op": "get"}, io.BytesIO(), max_bytes=1000)
