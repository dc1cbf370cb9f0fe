"""The table of contents at the head of a payload: which files follow, in which order, of which sizes.

    payload = length of the table, u32 little-endian || canonical JSON {"files": [[name, size], ...], "format": ...}
              || files, one after the other

Names are relative, of letters, digits and ``._+=@-``, with ``/`` between folders: whoever unpacks the files can trust
them with a path.
"""

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from obfuscatune.errors import FormatError
from obfuscatune.parties.canonical import MAX_BYTES, decode, encode

FORMAT = "obfuscatune archive 1"
LENGTH = struct.Struct("<I")
MAX_TABLE_BYTES = MAX_BYTES
MAX_FILES = 4096
MAX_NAME_CHARS = 200
MAX_FILE_BYTES = 1 << 40
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=@-]*(/[A-Za-z0-9_][A-Za-z0-9._+=@-]*){0,3}")


@dataclass(frozen=True)
class Entry:
    """Where a file is in the payload."""

    offset: int
    size: int


def check_name(name: Any) -> str:
    """Return ``name`` if it can be one in a table of contents; raises FormatError, without showing it."""
    if not isinstance(name, str) or len(name) > MAX_NAME_CHARS or not _NAME.fullmatch(name):
        expected = f"relative, at most {MAX_NAME_CHARS} letters, digits and '._+=@-', no part that begins with '.'"
        raise FormatError("name of a file", expected=expected)
    return name


def encode_contents(sizes: Mapping[str, int]) -> bytes:
    """Return length and table for files of these sizes; raises FormatError where a reader would refuse."""
    data = encode({"files": [[name, size] for name, size in sizes.items()], "format": FORMAT})
    decode_contents(data, LENGTH.size + len(data) + sum(sizes.values()))
    return LENGTH.pack(len(data)) + data


def decode_contents(data: bytes, payload_bytes: int) -> dict[str, Entry]:
    """Return the entries of the table ``data`` (without its length), in their order.

    Raises:
        FormatError: not canonical, other fields, a name that cannot be trusted with a path, two names that a file
            system may take for one, a file that is also a folder, or sizes that do not add up to the payload.
    """
    fields = decode(data, "table of contents", max_bytes=MAX_TABLE_BYTES)
    if set(fields) != {"files", "format"} or fields["format"] != FORMAT:
        raise FormatError("table of contents has other fields", expected=FORMAT)
    rows = fields["files"]
    if not isinstance(rows, list) or not 1 <= len(rows) <= MAX_FILES:
        raise FormatError("table of contents: files", expected=f"a list of 1 to {MAX_FILES}")
    entries: dict[str, Entry] = {}
    offset = LENGTH.size + len(data)
    for row in rows:
        if not isinstance(row, list) or len(row) != 2:
            raise FormatError("table of contents: a row", expected="[name, size]")
        name, size = check_name(row[0]), row[1]
        if type(size) is not int or not 0 <= size <= MAX_FILE_BYTES:
            raise FormatError("table of contents: a size", expected=f"0 to {MAX_FILE_BYTES} bytes")
        entries[name] = Entry(offset, size)
        offset += size
    # On some file systems `A` and `a` are one file; the second would overwrite the first.
    folded = {name.lower() for name in entries}
    folders = {name[:end] for name in folded for end, letter in enumerate(name) if letter == "/"}
    if len(folded) != len(rows) or folded & folders:
        raise FormatError("table of contents names a file twice, or a file as a folder")
    if offset != payload_bytes:
        raise FormatError("table of contents does not add up", got=f"{offset} bytes", expected=payload_bytes)
    return entries
