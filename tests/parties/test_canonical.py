"""One value, one encoding; every other spelling is refused, without a part of it in the message."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obfuscatune.errors import FormatError
from obfuscatune.parties.canonical import MAX_DEPTH, MAX_VALUES, decode, encode

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=5
)
objects = st.dictionaries(texts, values, max_size=4)


def exact(value: object) -> object:
    """A form in which 1, 1.0 and True, and 0.0 and -0.0, differ."""
    if isinstance(value, dict):
        return {key: exact(part) for key, part in value.items()}
    return [exact(part) for part in value] if isinstance(value, list) else (type(value), repr(value))


@given(objects)
def test_round_trip(value: dict) -> None:
    assert exact(decode(encode(value), "value")) == exact(value)


@given(objects)
def test_order_of_keys_does_not_matter(value: dict) -> None:
    assert encode(dict(reversed(value.items()))) == encode(value)


@given(st.binary(max_size=80) | texts.map(str.encode))
def test_arbitrary_bytes(data: bytes) -> None:
    try:
        value = decode(data, "value")
    except FormatError:
        return
    assert encode(value) == data


@given(objects, st.data())
def test_another_spelling_is_refused(value: dict, data: st.DataObject) -> None:
    spelling = data.draw(st.sampled_from([{"indent": 1}, {"separators": (", ", ":")}, {"separators": (",", ": ")}]))
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, **spelling).encode()
    if text == encode(value):
        return
    with pytest.raises(FormatError, match="canonical"):
        decode(text, "value")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"a":1}\n',
        b'{"b":1,"a":1}',
        b'{"a":1,"a":1}',
        b'{"a":1.50}',
        b'{"a":1e2}',
        b'{"a":-0}',
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":1e999}',
        b'{"a":18446744073709551616}',
        b'{"a":' + b"9" * 5000 + b"}",
        b'{"a":"\\u0061"}',
        b'{"a":"\\/"}',
        b'{"a":"\\ud800"}',
        b'{"a":"\xff"}',
        b"\xef\xbb\xbf{}",
        b"[" * 100_000,
    ],
)
def test_refused(text: bytes) -> None:
    with pytest.raises(FormatError):
        decode(text, "value")


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        1 << 64,
        -(1 << 63) - 1,
        b"bytes",
        (1, 2),
        {1: 2},
        "\ud800",
        {"\udfff": 1},
        object(),
        [0] * MAX_VALUES,
    ],
)
def test_a_value_without_a_form_is_refused(value: object) -> None:
    with pytest.raises(FormatError):
        encode({"a": value})


def test_depth_is_limited_to_the_last_level() -> None:
    deep: object = 0
    for _ in range(MAX_DEPTH - 1):
        deep = {"a": deep}
    assert decode(encode(deep), "value") == deep
    with pytest.raises(FormatError, match="too deep"):
        encode({"a": deep})


def test_length_is_checked_before_anything_else() -> None:
    with pytest.raises(FormatError, match="too long"):
        decode(b"[" * 11, "value", max_bytes=10)


@pytest.mark.parametrize("text", [b'{"a":"canary', b'{"canary":1,"a":2 }', b'{"canary":NaN}', b'{"canary":"\xff"}'])
def test_no_message_holds_the_data(text: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        decode(text, "value")
    error: BaseException | None = caught.value
    while error is not None:  # nor any exception that it came from
        assert "canary" not in f"{error} {error.args}"
        assert not getattr(error, "doc", None) and not getattr(error, "object", None)
        error = error.__context__
