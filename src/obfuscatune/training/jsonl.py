"""JSONL of the data owner's: lines in, objects out, and the checks of their keys and texts, with file and line.

The rows are secret. A message about a bad row tells types, public names of keys and positions, never its content; that
is also why a decoding error is dropped before ours is raised: Python's own exceptions carry the text they failed on.
"""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from obfuscatune.errors import DataError, UsageError

MAX_LINE_BYTES = 1_000_000
_MOST_TOLD = 8  # keys in one message
# Keys that data sets have in public. Any other may be content: in `{"Jane Roe": "..."}` it is a patient.
_PUBLIC = {
    "answer", "answers", "category", "choices", "chosen", "completion", "content", "context", "conversations", "date",
    "from", "human", "id", "index", "input", "instruction", "label", "labels", "language", "license", "messages",
    "meta", "metadata", "model", "name", "output", "prompt", "question", "rejected", "response", "role", "score",
    "source", "split", "subject", "summary", "support", "system", "tags", "target", "task", "text", "title", "tools",
    "topic", "type", "url", "user", "value",
}  # fmt: skip

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell them, UTF-8 and so every tokenizer cannot


def read_objects(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (``file:line``, object) for each line of a JSONL file that is not blank.

    Raises:
        UsageError: the file cannot be read.
        DataError: a line is longer than 1 MB, not UTF-8, not JSON or not an object, or there is none.
    """
    found = False
    for where, line in _lines(Path(path)):
        if not line.strip():
            continue
        row = _decode(line, where)
        if not isinstance(row, dict):
            raise DataError("row is not an object", got=type(row).__name__, expected="a JSON object", where=where)
        found = True
        yield where, row
    if not found:
        raise DataError("file has no rows", expected="one JSON object per line", where=f"{path}:1")


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise UsageError(
            "cannot read the data file", got=error.strerror, where=str(path), hint="give the path of a JSONL file"
        ) from None
    with file:
        number = 0
        # The limit is given to readline, so that a file without line ends is never read whole.
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)  # editors of Windows write it
            where = f"{path}:{number}"
            if len(line) > MAX_LINE_BYTES:
                expected = f"at most {MAX_LINE_BYTES:,} bytes"
                raise DataError("line is too long", expected=expected, where=where, hint="split it into several rows")
            yield where, line


def _decode(line: bytes, where: str) -> Any:
    try:
        text = line.rstrip().decode("utf-8")
    except UnicodeDecodeError as error:
        problem = DataError("line is not UTF-8", got=f"a bad byte at column {error.start + 1}", where=where)
    else:
        try:
            return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
        except _NotJsonError as error:
            problem = DataError("line is not JSON", got=error.got, where=where)
        except json.JSONDecodeError as error:
            problem = DataError("line is not JSON", got=f"a syntax error at column {error.pos + 1}", where=where)
        except (ValueError, RecursionError) as error:
            problem = DataError("line is not JSON", got=f"a {type(error).__name__} in the decoder", where=where)
    raise problem  # here and not in the handlers: an exception raised there would hold the line as its context


class _NotJsonError(Exception):
    """What Python's decoder takes, and JSON does not have, or leaves open. Attributes: ``got``: safe to show."""

    def __init__(self, got: str) -> None:
        super().__init__(got)
        self.got = got


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that is there twice: the decoder would drop the first value in silence."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _NotJsonError("a key twice in one object")
    return found


def _no_number(name: str) -> float:
    raise _NotJsonError(name)


def check_keys(row: dict[str, Any], wanted: frozenset[str], allowed: frozenset[str], where: str) -> None:
    """Refuse a row that lacks a wanted key or has one that is neither wanted nor allowed."""
    missing, unknown = sorted(wanted - row.keys()), sorted(row.keys() - wanted - allowed)
    if missing or unknown:
        got = "; ".join([f"no {name!r}" for name in missing] + ([f"unknown {told(unknown, row)}"] if unknown else []))
        expected = f"{' + '.join(sorted(wanted))}, and nothing else but {', '.join(sorted(allowed))}"
        raise DataError("row has the wrong keys", got=got, expected=expected, where=where)


def told(keys: list[str], row: dict[str, Any]) -> str:
    """Return how keys of a row are told: public names as they are, others, which may be content, by their place."""
    places = {key: place for place, key in enumerate(row, 1)}
    names = [f"key {key!r}" if key in _PUBLIC else f"key {places[key]} of {len(row)} (name not shown)" for key in keys]
    return ", ".join(names[:_MOST_TOLD]) + (f" and {len(names) - _MOST_TOLD} more" if len(names) > _MOST_TOLD else "")


def check_text(value: Any, name: str, where: str) -> str:
    """Return ``value`` if it is a string with something in it that can be encoded."""
    if not isinstance(value, str):
        raise DataError(f"{name!r} has the wrong type", got=type(value).__name__, expected="a string", where=where)
    if not value.strip():
        raise DataError(f"{name!r} is empty", expected="text", where=where)
    if _LONE_SURROGATE.search(value):
        raise DataError(f"{name!r} has half a surrogate pair", expected="Unicode text", where=where)
    return value
