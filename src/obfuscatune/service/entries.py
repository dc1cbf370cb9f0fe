"""One entry of the audit log, and the chain of hashes that holds them together; the format is at the head of log.py."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from obfuscatune.errors import FormatError
from obfuscatune.parties.canonical import decode, encode

NO_ENTRIES = "0" * 64
MAX_LINE_BYTES = 4096
DIGEST = re.compile(r"[0-9a-f]{64}")
END_OF_TIME = 253_402_300_800  # the year 10000, which no calendar of Python has
_MAX_DETAILS = 16
_WORD = re.compile(r"[A-Za-z0-9._:+=-]{1,80}")
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,39}")
_FIELDS = {"details", "event", "job", "party", "previous", "seq", "time"}


@dataclass(frozen=True)
class Entry:
    """One entry; its fields are those of the head of this module. Public to the parties of the enclave."""

    seq: int
    time: int
    event: str
    job: str | None
    party: str | None
    details: dict[str, str | int]
    previous: str

    def __post_init__(self) -> None:
        """Refuse what is no entry, our own too; raises FormatError, without any of it in the message."""
        numbers = all(type(n) is int and 0 <= n < END_OF_TIME for n in (self.seq, self.time))
        digests = all(matches(DIGEST, d) for d in (self.job, self.party, self.previous) if d is not None)
        if not numbers or not digests or self.previous is None or not matches(_NAME, self.event):
            raise FormatError("entry of the log with a field of a wrong form")
        if type(self.details) is not dict or len(self.details) > _MAX_DETAILS:
            raise FormatError("entry of the log with too many details", expected=f"an object of at most {_MAX_DETAILS}")
        for name, value in self.details.items():
            if not matches(_NAME, name) or not (type(value) is int or matches(_WORD, value)):
                raise FormatError("detail of an entry of the log", expected="an integer, or a word of at most 80")

    def to_bytes(self) -> bytes:
        """Return the canonical encoding, without a line end; raises FormatError where it is too long."""
        data = encode(vars(self))
        if len(data) >= MAX_LINE_BYTES:
            raise FormatError("entry of the log is too long", expected=f"less than {MAX_LINE_BYTES} bytes")
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> "Entry":
        """Return the entry of a line without its end; raises FormatError."""
        fields = decode(data, "entry of the log", max_bytes=MAX_LINE_BYTES)
        if set(fields) != _FIELDS:
            raise FormatError("entry of the log with other fields", expected=", ".join(sorted(_FIELDS)))
        return cls(**fields)


class Chain:
    """Reads entries in order: number and digest of the last one."""

    def __init__(self) -> None:
        self.length, self.head = 0, NO_ENTRIES

    def take(self, line: bytes) -> Entry:
        """Take the next line, with its end; raises FormatError with the entry's number."""
        problem: FormatError
        try:
            if not line.endswith(b"\n") or len(line) > MAX_LINE_BYTES:
                raise FormatError("entry of the log is too long or has no end")
            entry = Entry.from_bytes(line[:-1])
            if entry.seq != self.length or entry.previous != self.head:
                raise FormatError("entry of the log does not follow the one before")
        except FormatError as error:
            problem = FormatError(error.what, got=error.got, expected=error.expected, where=f"entry {self.length}")
        else:
            self.length, self.head = self.length + 1, hashlib.sha256(line[:-1]).hexdigest()
            return entry
        raise problem


def split_lines(lines: bytes) -> Iterator[bytes]:
    """Return the lines with their ends; one without an end, or too long, comes in parts that no chain takes."""
    start = 0
    while start < len(lines):
        end = lines.find(b"\n", start, start + MAX_LINE_BYTES)
        stop = end + 1 if end >= 0 else min(len(lines), start + MAX_LINE_BYTES)
        yield lines[start:stop]
        start = stop


def matches(pattern: re.Pattern[str], value: Any) -> bool:
    """Return whether ``value`` is a string that the whole of ``pattern`` describes."""
    return type(value) is str and pattern.fullmatch(value) is not None
