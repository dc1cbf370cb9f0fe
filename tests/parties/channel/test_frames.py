"""Messages over bytes and over sockets: one encoding, limits before memory, one deadline, hostile bytes."""

import math
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obfuscatune.errors import ConnectionClosedError, ProtocolError, UsageError
from obfuscatune.parties.channel.frames import HELLO, SESSION, MessageLimits, Stream, encode_message, read_message

SMALL = MessageLimits(200, 100)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
fields_maps = st.dictionaries(st.text(max_size=4), values, max_size=4)


def reader(data: bytes, asked: list[int] | None = None) -> Callable[[int], bytes]:
    """Read ``data`` to its end, noting each size asked for."""
    position = 0

    def read(size: int) -> bytes:
        nonlocal position
        if asked is not None:
            asked.append(size)
        part = data[position : position + size]
        position += size
        if len(part) < size:
            raise ConnectionClosedError("cut")
        return part

    return read


def soon() -> float:
    return time.monotonic() + 20


@given(fields_maps, st.binary(max_size=50))
def test_round_trip(fields: dict[str, Any], payload: bytes) -> None:
    data = encode_message(fields, payload, SESSION) + payload
    assert read_message(reader(data), SESSION) == (fields, payload)
    for cut in {0, 3, len(data) // 2, len(data) - 1}:
        with pytest.raises(ConnectionClosedError):
            read_message(reader(data[:cut]), SESSION)


@pytest.mark.parametrize(("fields", "payload"), [({"a": "x" * 200}, b""), ({}, bytes(101))])
def test_what_is_beyond_the_limits_is_not_sent(fields: dict[str, Any], payload: bytes) -> None:
    with pytest.raises(UsageError, match=r"message is too long: .* at most 200 of fields and 100 of payload"):
        encode_message(fields, payload, SMALL)


@pytest.mark.parametrize("value", [{1}, b"bytes", math.nan, {1: 2}, 2**64, "\ud800"])
def test_what_has_no_canonical_form_is_not_sent(value: Any) -> None:
    with pytest.raises(UsageError):
        encode_message({"a": value}, b"", SMALL)


@pytest.mark.parametrize("length", [201, 2**31, 2**32 - 1])
def test_long_fields_are_refused_before_they_are_read(length: int) -> None:
    asked: list[int] = []
    with pytest.raises(ProtocolError, match="fields too long"):
        read_message(reader(struct.pack("<I", length), asked), SMALL)
    assert asked == [4]


@pytest.mark.parametrize("length", [101, 2**32, 2**64 - 1])
def test_a_long_payload_is_refused_before_it_is_read(length: int) -> None:
    asked: list[int] = []
    with pytest.raises(ProtocolError, match="payload too long"):
        read_message(reader(struct.pack("<I", 2) + b"{}" + struct.pack("<Q", length), asked), SMALL)
    assert asked == [4, 2, 8]


def test_exactly_the_limits_are_taken() -> None:
    data = struct.pack("<I", 200) + b'{"a":"' + b"x" * 192 + b'"}' + struct.pack("<Q", 100) + bytes(100)
    assert read_message(reader(data), SMALL)[1] == bytes(100)


@pytest.mark.parametrize("text", [b"", b"[]", b"{} ", b'{"b":1,"a":2}', b'{"a":1,"a":1}', b'{"a":NaN}', b"\xff", b"["])
def test_fields_in_another_form_are_refused(text: bytes) -> None:
    with pytest.raises(ProtocolError):
        read_message(reader(struct.pack("<I", len(text)) + text + bytes(8)), SMALL)


def test_a_refusal_quotes_nothing_of_the_message() -> None:
    text = b'{"prompt": "canary"}'
    with pytest.raises(ProtocolError) as caught:
        read_message(reader(struct.pack("<I", len(text)) + text + bytes(8)), SMALL)
    assert "canary" not in str(caught.value)


@settings(max_examples=300)
@given(st.binary(max_size=80) | st.binary(max_size=60).map(lambda raw: struct.pack("<I", len(raw)) + raw + bytes(8)))
def test_arbitrary_bytes(raw: bytes) -> None:
    asked: list[int] = []
    try:
        fields, payload = read_message(reader(raw, asked), SMALL)
    except ProtocolError:
        pass
    else:
        assert raw.startswith(encode_message(fields, payload, SMALL) + payload)
    assert max(asked) <= 200


MESSAGE = encode_message({"fields": {"verb": "status", "n": 12}, "id": 3}, b"payload", SESSION) + b"payload"


@settings(max_examples=300)
@given(st.integers(0, len(MESSAGE) * 8 - 1))
def test_a_flipped_bit_is_refused_or_another_message(bit: int) -> None:
    changed = bytearray(MESSAGE)
    changed[bit // 8] ^= 1 << bit % 8
    try:
        fields, payload = read_message(reader(bytes(changed)), SMALL)
    except ProtocolError:
        return
    assert bytes(changed).startswith(encode_message(fields, payload, SMALL) + payload)
    assert (fields, payload) != read_message(reader(MESSAGE), SMALL)


def test_over_a_socket_in_small_pieces() -> None:
    left, right = socket.socketpair()
    payload = bytes(range(256)) * 8000
    with closing(Stream(left, "b")) as a, closing(Stream(right, "a")) as b:
        for sock in (left, right):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        thread = threading.Thread(target=lambda: a.send({"x": 1}, payload, limits=SESSION, deadline=soon()))
        thread.start()
        assert b.receive(SESSION, deadline=soon()) == ({"x": 1}, payload)
        thread.join(20)
        assert not thread.is_alive()


def test_a_refused_message_closes_the_stream() -> None:
    left, right = socket.socketpair()
    with closing(Stream(left, "peer p")) as stream, right:
        right.sendall(struct.pack("<I", HELLO.fields + 1) + MESSAGE)
        with pytest.raises(ProtocolError, match=r"fields too long.*\(at peer p\)"):
            stream.receive(HELLO, deadline=soon())
        with pytest.raises(ConnectionClosedError):
            stream.receive(SESSION, deadline=soon())


def test_an_oversized_message_leaves_the_stream_open() -> None:
    left, right = socket.socketpair()
    with closing(Stream(left, "b")) as a, closing(Stream(right, "a")) as b:
        with pytest.raises(UsageError):
            a.send({}, bytes(1), limits=HELLO, deadline=soon())
        a.send({}, limits=HELLO, deadline=soon())
        assert b.receive(HELLO, deadline=soon()) == ({}, b"")


def test_a_peer_that_says_nothing_or_trickles_is_left() -> None:
    left, right = socket.socketpair()
    late = pytest.raises(ConnectionClosedError, match=r"peer is too slow \(at peer p\)")
    with closing(Stream(left, "peer p")) as stream, right, late:
        stream.receive(SESSION, deadline=time.monotonic() + 0.01)
    left, right = socket.socketpair()
    with closing(Stream(left, "peer p")) as stream, right:
        right.sendall(MESSAGE)  # all of it is there, but the time is over
        with pytest.raises(ConnectionClosedError, match="too slow"):
            stream.receive(SESSION, deadline=time.monotonic() - 1)


def test_a_peer_that_does_not_read_is_left() -> None:
    left, right = socket.socketpair()
    with closing(Stream(left, "p")) as stream, right, pytest.raises(ConnectionClosedError, match="too slow"):
        stream.send({}, bytes(4 * 1024**2), limits=SESSION, deadline=time.monotonic() + 0.05)


def test_close_wakes_a_receive_in_another_thread() -> None:
    left, right = socket.socketpair()
    caught: list[Exception] = []

    def wait() -> None:
        try:
            stream.receive(SESSION, deadline=soon())
        except ConnectionClosedError as error:
            caught.append(error)

    with right:
        stream = Stream(left, "p")
        thread = threading.Thread(target=wait)
        thread.start()
        stream.close()
        stream.close()
        thread.join(20)
    assert len(caught) == 1
