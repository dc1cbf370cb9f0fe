"""Canonical JSON: one value has one encoding, so that what was hashed and signed is what is read.

Objects with their keys sorted by code point, no white space, UTF-8 without escapes but those that JSON requires,
integers within 64 bits, finite floats in the shortest form that reads back (Python's ``repr``), no key twice. A reader
decodes, encodes what it got and compares: any other spelling is refused. Depth, length and number of values are limited
before anything is built.
"""

import base64
import json
import math
from typing import Any

from obfuscatune.errors import FormatError

MAX_BYTES = 1 << 20
MAX_DEPTH = 8
MAX_VALUES = 100_000
_INTEGERS = range(-(1 << 63), 1 << 64)


def encode(value: Any) -> bytes:
    """Return the canonical encoding of maps, lists, strings, integers, finite floats, booleans and None.

    Raises:
        FormatError: another type, a key that is no string, a number out of range, too deep or too many values.
    """
    _check(value)
    return _dump(value)


def decode(data: bytes, what: str, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Return the object that ``data`` is the canonical encoding of; ``what`` names it in errors.

    Raises:
        FormatError: too long, not JSON, not an object, or not in canonical form. No message holds a part of the data.
    """
    if len(data) > max_bytes:
        raise FormatError(f"{what} is too long", got=f"{len(data)} bytes", expected=f"at most {max_bytes}")
    problem: FormatError | None = None
    value: Any = None
    try:
        value = json.loads(bytes(data).decode("utf-8"), parse_constant=_refuse, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        problem = FormatError(f"{what} is not canonical JSON", got=f"a {type(error).__name__} in the decoder")
    if problem is not None:  # outside the handler: the decoder's own exception holds the text
        raise problem
    if not isinstance(value, dict):
        raise FormatError(f"{what} is not an object", got=type(value).__name__)
    try:
        same = encode(value) == bytes(data)
    except FormatError as error:
        raise FormatError(f"{what} is not canonical JSON: {error.what}", got=error.got) from None
    if not same:
        raise FormatError(f"{what} is not in canonical form", hint="keys sorted, no white space, one spelling a value")
    return value


def _dump(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _refuse(name: str) -> Any:
    raise ValueError("not a finite number")


def _check(value: Any) -> None:
    """Walk without recursion, so that a hostile depth is an error and not the end of the stack."""
    count, pending = 0, [(value, 1)]
    while pending:
        item, depth = pending.pop()
        count += 1
        if count > MAX_VALUES or depth > MAX_DEPTH:
            what = "too many values" if count > MAX_VALUES else "nested too deep"
            raise FormatError(what, expected=f"at most {MAX_VALUES} values, {MAX_DEPTH} deep")
        if type(item) is dict:
            if not all(type(key) is str for key in item):
                raise FormatError("a key that is no string")
            pending += [(part, depth + 1) for pair in item.items() for part in pair]
        elif type(item) is list:
            pending += [(part, depth + 1) for part in item]
        elif type(item) is str:
            _check_text(item)
        elif type(item) is int:
            if item not in _INTEGERS:
                raise FormatError("an integer out of range", expected="-2^63 to 2^64 - 1")
        elif type(item) is float:
            if not math.isfinite(item):
                raise FormatError("a float that is not finite")
        elif item is not None and type(item) is not bool:
            raise FormatError("a value of a type that has no canonical form", got=type(item).__name__)


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise FormatError("half a surrogate pair in a string") from None


def unbase64(value: Any, what: str) -> bytes:
    """Return the bytes of a field in canonical base64, one at least; raises FormatError where it is none."""
    try:
        data = base64.b64decode(value, validate=True) if isinstance(value, str) else b""
    except ValueError:
        data = b""
    if not data or base64.b64encode(data).decode() != value:
        raise FormatError(f"{what}: a field is not base64")
    return data
