"""Mutations of valid inputs: of their bytes, and of values in canonical JSON, where byte edits get nowhere."""

import json
import random
from collections.abc import Sequence
from typing import Any

from obfuscatune.errors import FormatError
from obfuscatune.parties.canonical import encode

_NUMBERS = (0, -1, 1, 255, 2**31, 2**53, 2**63 - 1, 2**64 - 1, -(2**63), 0.5, 1e308)
_TEXTS = ("", "0", "a" * 64, "0" * 64, "../../etc/passwd", "\n", "\x00", "\u202e", "A" * 5000, "=", "AAAA")
_OTHERS = (None, True, False, [], {}, [[]], [{}], {"format": None})


def mutate(data: bytes, choose: random.Random) -> bytes:
    """Return another input: a few edits of the bytes, or, of JSON, of its values in half of the cases."""
    if choose.random() < 0.5:
        changed = _mutate_json(data, choose)
        if changed is not None:
            return changed
    edited = bytearray(data)
    for _ in range(choose.choice((1, 1, 1, 2, 4, 8))):
        _edit(edited, choose)
    return bytes(edited)


def _edit(data: bytearray, choose: random.Random) -> None:
    at = choose.randrange(len(data) + 1)
    end = min(len(data), at + choose.choice((1, 1, 2, 4, 8, 64)))
    kind = choose.randrange(6)
    if kind == 0 and at < len(data):
        data[at] ^= 1 << choose.randrange(8)
    elif kind == 1:
        data[at:end] = choose.choice((b"\0", b"\xff")) * (end - at)  # lengths: none, and the largest
    elif kind == 2:
        del data[at:end]
    elif kind == 3:
        del data[at:]
    elif kind == 4:
        data[at:at] = data[at:end]
    else:
        data[at:at] = choose.randbytes(choose.choice((1, 2, 8)))


def _mutate_json(data: bytes, choose: random.Random) -> bytes | None:
    """Return the JSON object at the begin of ``data`` with one value changed, or None where there is none."""
    try:
        value, end = json.JSONDecoder().raw_decode(data.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    places: list[tuple[Any, Any]] = []
    pending = [value]
    while pending:
        item = pending.pop()
        parts: Sequence[tuple[Any, Any]] = ()
        if isinstance(item, dict):
            parts = list(item.items())
        elif isinstance(item, list):
            parts = list(enumerate(item))
        places += [(item, key) for key, _ in parts]
        pending += [part for _, part in parts]
    if not places:
        return None
    container, key = choose.choice(places)
    kind = choose.randrange(8)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, dict):
        container[choose.choice(_TEXTS)] = container[key]
    elif kind == 2:
        other, name = choose.choice(places)
        container[key] = json.loads(json.dumps(other.get(name) if isinstance(other, dict) else value))
    elif kind == 3 and isinstance(container[key], str):
        text = bytearray(container[key].encode())
        _edit(text, choose)
        container[key] = text.decode("utf-8", errors="replace")
    else:
        container[key] = choose.choice(choose.choice((_NUMBERS, _TEXTS, _OTHERS)))
    try:
        return encode(value) + data.decode("utf-8")[end:].encode()
    except FormatError:
        return None
