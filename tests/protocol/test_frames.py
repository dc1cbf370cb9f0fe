"""The encoding: round trips, and that whatever the bytes, decoding returns or raises ProtocolError."""

import tracemalloc

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from obfuscatune.errors import ProtocolError, UsageError
from obfuscatune.protocol.frames import (
    DTYPES,
    PREFIX,
    TensorSpec,
    decode_frame,
    decode_header,
    decode_prefix,
    encode_head,
)
from obfuscatune.protocol.limits import Limits

SMALL = Limits(
    max_header_bytes=512, max_payload_bytes=4096, max_tensors=3, max_dims=3, max_name_chars=8, max_depth=3, max_items=16
)

scalars = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
values = st.recursive(
    scalars | texts, lambda v: st.lists(v, max_size=3) | st.dictionaries(texts, v, max_size=3), max_leaves=6
)
names = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=8)
tables = st.lists(
    st.builds(
        TensorSpec, names, st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 5), max_size=4).map(tuple)
    ),
    max_size=4,
    unique_by=lambda spec: spec.name,
)
fields_maps = st.dictionaries(texts.filter(lambda k: k != "tensors"), values, max_size=4)


def frame_of(header: object, payload: bytes = b"", *, raw: bytes | None = None) -> bytes:
    """A frame with a right prefix around any header."""
    body = msgpack.packb(header) if raw is None else raw
    return PREFIX.pack(b"OBFT", 2, b"\0\0\0", len(body), len(payload)) + body + payload


@given(fields_maps, tables)
def test_round_trip(fields: dict, specs: list[TensorSpec]) -> None:
    limits = Limits(max_depth=20)
    head, length = encode_head(fields, specs, limits)
    payload = bytes(i % 2 for i in range(length))
    got, tensors = decode_frame(head + payload, limits)
    assert got == fields
    assert [spec for spec, _ in tensors.values()] == specs
    assert b"".join(bytes(raw) for _, raw in tensors.values()) == payload
    assert encode_head(got, [spec for spec, _ in tensors.values()], limits)[0] == head


@given(st.binary(max_size=200))
def test_arbitrary_bytes(raw: bytes) -> None:
    with pytest.raises(ProtocolError):  # nothing else, and never a frame: 20 right bytes do not come by chance
        decode_frame(raw, SMALL)


@given(st.binary(max_size=100))
def test_arbitrary_header(raw: bytes) -> None:
    try:
        fields, specs = decode_header(raw, 0, SMALL)
    except ProtocolError:
        return
    assert encode_head(fields, specs, SMALL)[0][PREFIX.size :] == raw


@given(st.recursive(scalars | texts | st.binary(max_size=4) | st.floats(), lambda v: st.lists(v, max_size=4)))
def test_arbitrary_tables(table: object) -> None:
    try:
        decode_header(msgpack.packb({"tensors": table}), 0, SMALL)
    except ProtocolError:
        return
    assert isinstance(table, list)
    assert all(isinstance(row, list) and len(row) == 3 for row in table)


@given(fields_maps, tables, st.data())
def test_flipped_bits_and_cuts(fields: dict, specs: list[TensorSpec], data: st.DataObject) -> None:
    head, length = encode_head(fields, specs, Limits(max_depth=20))
    frame = bytearray(head + bytes(length))
    with pytest.raises(ProtocolError):
        decode_frame(frame[: data.draw(st.integers(0, len(frame) - 1))], Limits(max_depth=20))
    frame[data.draw(st.integers(0, len(head) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        got, tensors = decode_frame(frame, Limits(max_depth=20))
    except ProtocolError:
        return
    again, _ = encode_head(got, [spec for spec, _ in tensors.values()], Limits(max_depth=20))
    assert frame.startswith(again)  # what is accepted has this one encoding


def nested(depth: int) -> list:
    return [nested(depth - 1)] if depth else []


HOSTILE_HEADERS = {
    "not a map": [1],
    "no table": {"id": 1},
    "table not a list": {"tensors": {}},
    "row not a list": {"tensors": ["x"]},
    "short row": {"tensors": [["x", "uint8"]]},
    "name empty": {"tensors": [["", "uint8", [0]]]},
    "name too long": {"tensors": [["x" * 9, "uint8", [0]]]},
    "name with control characters": {"tensors": [["a\nb", "uint8", [0]]]},
    "name no string": {"tensors": [[1, "uint8", [0]]]},
    "name twice": {"tensors": [["x", "uint8", [0]], ["x", "uint8", [0]]]},
    "dtype unknown": {"tensors": [["x", "complex64", [0]]]},
    "dtype no string": {"tensors": [["x", [], [0]]]},
    "shape no list": {"tensors": [["x", "uint8", 0]]},
    "too many dimensions": {"tensors": [["x", "uint8", [0, 1, 1, 1]]]},
    "too many tensors": {"tensors": [[n, "uint8", [0]] for n in "abcd"]},
    "negative size": {"tensors": [["x", "uint8", [-1]]]},
    "two negative sizes": {"tensors": [["x", "uint8", [-1, -0, -1]]]},
    "size a float": {"tensors": [["x", "uint8", [0.0]]]},
    "size a bool": {"tensors": [["x", "uint8", [False]]]},
    "huge size": {"tensors": [["x", "uint8", [2**63]]]},
    "product is 0 modulo 2**64": {"tensors": [["x", "uint8", [2**32, 2**32]]]},
    "empty but its strides overflow": {"tensors": [["x", "uint8", [0, 2**63, 2**63]]]},
    "more bytes than announced": {"tensors": [["x", "uint8", [1]]]},
    "table not last": {"tensors": [], "id": 1},
    "float not finite": {"a": float("inf"), "tensors": []},
    "nan": {"a": float("nan"), "tensors": []},
    "bytes": {"a": b"", "tensors": []},
    "bytes as a key": {b"a": 1, "tensors": []},
    "number as a key": {"a": {1: 1}, "tensors": []},
    "extension": {"a": msgpack.ExtType(5, b""), "tensors": []},
    "timestamp": {"a": msgpack.Timestamp(1), "tensors": []},
    "too deep": {"a": nested(3), "tensors": []},
    "far too deep": {"a": nested(200), "tensors": []},
    "too many values": {"a": [0] * 17, "tensors": []},
    "too many values in all": {"a": [0] * 8, "b": [0] * 8, "tensors": []},
}


@pytest.mark.parametrize("header", HOSTILE_HEADERS.values(), ids=HOSTILE_HEADERS)
def test_hostile_headers(header: object) -> None:
    decode_frame(frame_of({"a": 1, "tensors": []}), SMALL)  # the control
    with pytest.raises(ProtocolError):
        decode_frame(frame_of(header), SMALL)


@pytest.mark.parametrize("depth", [0, 1, 1000])
def test_a_tensor_table_of_any_depth(depth: int) -> None:
    raw = b"\x81\xa7tensors\x91\x93\xa1x" + b"\x91" * depth + b"\xa5uint8" + b"\x91\x00"
    if depth == 0:  # the control
        assert decode_frame(frame_of(None, raw=raw))[1].keys() == {"x"}
        return
    with pytest.raises(ProtocolError, match="unknown dtype: got list"):
        decode_frame(frame_of(None, raw=raw))


OTHER_ENCODINGS = {
    "trailing byte": b"\x81\xa7tensors\x90\x00",
    "repeated key": b"\x83\xa1a\x01\xa1a\x02\xa7tensors\x90",
    "long integer": b"\x82\xa1a\xcc\x01\xa7tensors\x90",
    "long string": b"\x82\xd9\x01a\x01\xa7tensors\x90",
    "long map": b"\xde\x00\x01\xa7tensors\x90",
    "float32": b"\x82\xa1a\xca\x3f\x80\x00\x00\xa7tensors\x90",
    "no UTF-8": b"\x82\xa1a\xa1\xff\xa7tensors\x90",
    "never used byte": b"\xc1",
    "array longer than the header": b"\xdd\xff\xff\xff\xff",
    "many open arrays": b"\xdc\x00\x10" * 150,
    "nothing": b"",
}


@pytest.mark.parametrize("raw", OTHER_ENCODINGS.values(), ids=OTHER_ENCODINGS)
def test_other_encodings(raw: bytes) -> None:
    decode_frame(frame_of(None, raw=b"\x82\xa1a\x01\xa7tensors\x90"), SMALL)  # the control
    with pytest.raises(ProtocolError):
        decode_frame(frame_of(None, raw=raw), SMALL)


@pytest.mark.parametrize(
    ("prefix", "what"),
    [
        ((b"HTTP", 1, b"\0\0\0", 10, 0), "not a frame of this protocol"),
        ((b"OBFT", 1, b"\0\0\0", 10, 0), "other protocol version: got 1, expected 2"),
        ((b"OBFT", 2, b"\0\0\1", 10, 0), "reserved bytes"),
        ((b"OBFT", 2, b"\0\0\0", 513, 0), "header too long: got 513, expected at most 512"),
        ((b"OBFT", 2, b"\0\0\0", 2**32 - 1, 0), "header too long"),
        ((b"OBFT", 2, b"\0\0\0", 10, 4097), "payload too long: got 4097, expected at most 4096"),
        ((b"OBFT", 2, b"\0\0\0", 10, 2**64 - 1), "payload too long"),
    ],
)
def test_hostile_prefixes(prefix: tuple, what: str) -> None:
    assert decode_prefix(PREFIX.pack(b"OBFT", 2, b"\0\0\0", 512, 4096), SMALL) == (512, 4096)
    with pytest.raises(ProtocolError, match=what):
        decode_prefix(PREFIX.pack(*prefix), SMALL)


def test_bytes_after_the_frame() -> None:
    with pytest.raises(ProtocolError, match="bytes follow"):
        decode_frame(frame_of({"tensors": []}) + b"\0")


def test_bools_are_0_or_1() -> None:
    header = {"tensors": [["m", "bool", [3]], ["e", "bool", [0]]]}
    decode_frame(frame_of(header, b"\0\1\0"))
    with pytest.raises(ProtocolError, match="bool"):
        decode_frame(frame_of(header, b"\0\2\0"))


def test_a_hostile_header_takes_little_memory() -> None:
    limits = Limits()
    shapes = [2**31 - 1] * limits.max_dims
    frames = [
        frame_of(None, raw=b"\xdc\x10\x00" * 80_000),
        frame_of(None, raw=b"\x91" * 200_000),
        frame_of({"tensors": [["x", "float64", shapes]] * 2}),
        frame_of({"tensors": [["x", "float64", [2**28 + 1]]]}),
    ]
    tracemalloc.start()
    try:
        for frame in frames:
            with pytest.raises(ProtocolError):
                decode_frame(frame, limits)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 * 1024**2  # msgpack's own bound of 1024 open arrays times 4096 pointers is 32 MiB


@pytest.mark.parametrize(
    ("fields", "specs"),
    [
        ({"tensors": []}, []),
        ({"a": (1, 2)}, []),
        ({"a": torch.float32}, []),
        ({"a": 2**64}, []),
        ({"a": "\ud800"}, []),
        ({1: 1}, []),
        ({"a": "x" * 600}, []),
        ({}, [TensorSpec("x", torch.complex64, (1,))]),
        ({}, [TensorSpec("x", torch.uint8, (4097,))]),
        ({}, [TensorSpec("x", torch.uint8, (4000,)), TensorSpec("y", torch.uint8, (97,))]),
    ],
)
def test_what_a_reader_would_refuse_is_not_sent(fields: dict, specs: list[TensorSpec]) -> None:
    with pytest.raises(UsageError, match="frame cannot be sent"):
        encode_head(fields, specs, SMALL)


@settings(max_examples=30)
@given(st.text(min_size=1, max_size=40))
def test_errors_do_not_quote_values(secret: str) -> None:
    marked = f"SECRET{secret}"
    for header in ({"a": marked}, {"tensors": marked}, {"a": [[[[marked]]]], "tensors": []}):
        with pytest.raises(ProtocolError) as caught:
            decode_frame(frame_of(header), SMALL)
        assert "SECRET" not in str(caught.value)
