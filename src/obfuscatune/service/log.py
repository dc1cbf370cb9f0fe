"""The audit log: what the enclave did, in a chain of hashes, without content; and the parties' check of it.

An entry is a line, the canonical JSON of

    {"details": {...}, "event": ..., "job": digest or null, "party": fingerprint or null,
     "previous": SHA-256 of the entry before, "seq": 0, 1, ..., "time": Unix seconds by the host's clock}

without its line end; ``previous`` of the first is 64 zeros. Details are a few integers and short words without spaces,
so that no sentence of a document and no message of an error fits in.

The enclave's file is these lines. The order of writing: the entry to the disk first, then the state with the log's new
head and length. Entries beyond the length of the state (one that the crash tore, or that was not committed) are dropped
at the next start: a chain of hashes has no key, so whoever owns the disk can write lines that chain. Commit therefore
before acting on an entry, and before signing a head. What is missing or changed within the length is refused.

A party's copy is a file: the signed head, as canonical JSON on the first line, and then all entries that it covers. A
chain shows that nothing was changed after the head was signed; that an enclave's owner did not put back an older state
and go on from there only the comparison with an earlier copy shows, which must be its beginning.
"""

import base64
import os
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from obfuscatune.durable import private, sync, write_all
from obfuscatune.errors import FormatError, RollbackError, SealError, StorageError, UsageError
from obfuscatune.parties.canonical import decode, encode
from obfuscatune.parties.identity import Identity, PublicIdentity
from obfuscatune.service.entries import DIGEST, END_OF_TIME, MAX_LINE_BYTES, Chain, Entry, matches, split_lines

FORMAT = "obfuscatune log head 1"
_REPLY_BYTES = 1 << 20
_CONTEXT = "log head"
_HEAD_FIELDS = {"format", "head", "length", "signature", "time"}


class AuditLog:
    """The enclave's log. Every method may be called from several threads.

    Attributes:
        dropped_bytes: what was found beyond the committed length at the start, and is gone.
    """

    def __init__(self, handle: int, path: Path) -> None:
        self._handle, self._path = handle, path
        self._chain, self._lock = Chain(), threading.Lock()
        self._ends = array("Q", [0])  # where each entry begins, and the last one ends
        self.dropped_bytes = 0

    @classmethod
    def open(cls, path: Path, head: str, length: int) -> "AuditLog":
        """Open the log that ends in ``head`` after ``length`` entries, as the sealed state has it.

        Raises:
            RollbackError: entries are missing, or it is another log.
            FormatError: an entry was changed.
            UsageError: the file cannot be opened.
        """
        try:
            handle = private(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        except OSError as error:
            raise UsageError("cannot open the audit log", got=error.strerror, where=str(path)) from None
        log = cls(handle, path)
        try:
            log._verify(head, length)
            sync(path.parent)
        except BaseException:
            log.close()
            raise
        return log

    @property
    def head(self) -> str:
        """Digest of the last entry, 64 zeros where there is none: ``log_head`` of the state."""
        return self._chain.head

    @property
    def length(self) -> int:
        """Number of entries: ``log_length`` of the state."""
        return self._chain.length

    def append(self, event: str, *, job: str | None = None, party: str | None = None, **details: str | int) -> Entry:
        """Write one entry, on the disk when this returns; commit the state next.

        Args:
            event: what was done, a word of small letters.
            job: digest of the job that it is about.
            party: fingerprint of who asked for it.
            details: counts, digests, names: integers and words, never a part of a message or a file.

        Raises:
            FormatError: a field of another form, or too long.
            ObfuscatuneError: the disk failed; the entry is not in the log.
        """
        with self._lock:
            chain = self._chain
            entry = Entry(chain.length, int(time.time()), event, job, party, details, chain.head)
            line = entry.to_bytes() + b"\n"
            try:
                os.ftruncate(self._handle, self._ends[-1])  # a part that an append left which failed
                write_all(self._handle, line)
                os.fsync(self._handle)
            except OSError as error:
                fault = StorageError("cannot write the audit log", got=error.strerror, where=str(self._path))
                raise fault from None
            chain.take(line)
            self._ends.append(self._ends[-1] + len(line))
            return entry

    def lines(self, start: int) -> bytes:
        """Return whole entries from number ``start`` on, as many as fit into 1 MiB; empty where there are none.

        Raises:
            UsageError: ``start`` is not from 0 to the length.
        """
        with self._lock:
            if not 0 <= start <= self.length:
                raise UsageError("entry of the audit log", got=start, expected=f"0 to {self.length}")
            stop = start
            while stop < self.length and self._ends[stop + 1] - self._ends[start] <= _REPLY_BYTES:
                stop += 1
            size = self._ends[stop] - self._ends[start]
            data = os.pread(self._handle, size, self._ends[start])
        if len(data) != size:
            raise RollbackError("the audit log was cut while the enclave runs", where=str(self._path))
        return data

    def signed_head(self, identity: Identity) -> dict[str, Any]:
        """Return the head that a party keeps: format, length, head, time, signature. Commit the state before."""
        with self._lock:
            fields = {"format": FORMAT, "head": self.head, "length": self.length, "time": int(time.time())}
        signature = identity.sign(_CONTEXT, encode(fields))
        return {**fields, "signature": base64.b64encode(signature).decode()}

    def close(self) -> None:
        """Close the file."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _verify(self, head: str, length: int) -> None:
        with open(self._handle, "rb", closefd=False) as file:
            while self.length < length:
                line = file.readline(MAX_LINE_BYTES + 1)
                if not line:
                    got, expected = f"{self.length} entries", f"{length}"
                    raise RollbackError("the audit log was cut", got=got, expected=expected, where=str(self._path))
                self._chain.take(line)
                self._ends.append(self._ends[-1] + len(line))
        if self.head != head:
            raise RollbackError("the audit log is not the one that the state knows", where=str(self._path))
        self.dropped_bytes = os.fstat(self._handle).st_size - self._ends[-1]
        os.ftruncate(self._handle, self._ends[-1])


@dataclass(frozen=True)
class CheckedLog:
    """A log that held: who signed its head (None: nobody was given to check that), when, how many entries are new.

    Attributes:
        entries: where they were kept. length: how many there are.
    """

    entries: tuple[Entry, ...]
    length: int
    signer: PublicIdentity | None
    signed_at: int
    new_entries: int


def check(
    lines: bytes, head: dict[str, Any], enclave: PublicIdentity | None, earlier: bytes | None = None
) -> CheckedLog:
    """Check a log that an enclave gave: the chain, the head's signature, and that an earlier copy is its beginning.

    Args:
        lines: all entries, as :meth:`AuditLog.lines` gives them.
        head: as :meth:`AuditLog.signed_head` gives it.
        enclave: who must have signed; None leaves open whose log it is.
        earlier: the lines of an earlier copy, itself checked when it was fetched.

    Raises:
        FormatError: an entry was changed, or head or entry has another form.
        SealError: the head was not signed by ``enclave``.
        RollbackError: entries are missing, or it is not the continuation of ``earlier``.
    """
    entries: list[Entry] = []
    before = None if earlier is None else split_lines(earlier)
    return replace(check_lines(split_lines(lines), head, enclave, before, entries.append), entries=tuple(entries))


def check_lines(
    lines: Iterable[bytes],
    head: dict[str, Any],
    enclave: PublicIdentity | None,
    earlier: Iterable[bytes] | None = None,
    take: Callable[[Entry], object] = lambda entry: None,
) -> CheckedLog:
    """Check a log as :func:`check` does, line by line: one of any length fits. ``take`` gets each entry.

    What ``take`` gets is checked only once this returns.
    """
    length, chain = _check_head(head, enclave), Chain()
    before, common, differs = iter(earlier or ()), 0, None
    for line in lines:
        entry = chain.take(line)
        then = next(before, None)
        if then is not None:
            common += 1
            if then != line and differs is None:
                differs = entry.seq
        take(entry)
    if chain.length < length:
        raise RollbackError("the log was cut", got=f"{chain.length} entries", expected=f"{length}")
    if chain.length > length or chain.head != head["head"]:
        raise RollbackError("the signed head is that of another log", got=f"{chain.length} entries", expected=length)
    hint = "keep both copies: the enclave's state or its log was put back, or there are two of it"
    if differs is not None:
        raise RollbackError("the log differs from your earlier copy", where=f"entry {differs}", hint=hint)
    if next(before, None) is not None:
        raise RollbackError("the log is shorter than your earlier copy", hint=hint)
    return CheckedLog((), length, enclave, head["time"], length - common)


@contextmanager
def open_copy(path: Path) -> Iterator[tuple[dict[str, Any], Iterator[bytes]]]:
    """Yield head and lines of a party's file, both unchecked; the lines are read as they are asked for.

    Raises:
        UsageError: it cannot be read. FormatError: it is no copy.
    """
    try:
        with path.open("rb") as file:
            first = file.readline(MAX_LINE_BYTES + 1)
            yield _read_head(first), iter(lambda: file.readline(MAX_LINE_BYTES + 1), b"")
    except OSError as error:
        raise UsageError("cannot read the copy of the log", got=error.strerror, where=str(path)) from None


def join_copy(lines: bytes, head: dict[str, Any]) -> bytes:
    """Return the content of a party's file."""
    return encode(head) + b"\n" + lines


def split_copy(data: bytes) -> tuple[bytes, dict[str, Any]]:
    """Return lines and head of a party's file, both unchecked; raises FormatError."""
    first, end, lines = data.partition(b"\n")
    return lines, _read_head(first + end)


def _read_head(line: bytes) -> dict[str, Any]:
    if not line.endswith(b"\n"):
        raise FormatError("file is no copy of an audit log", expected="a signed head on its first line")
    return decode(line[:-1], "signed head of the log", max_bytes=MAX_LINE_BYTES)


def _check_head(head: Any, enclave: PublicIdentity | None) -> int:
    """Return the length that is signed."""
    if not isinstance(head, dict) or set(head) != _HEAD_FIELDS or head["format"] != FORMAT:
        raise FormatError("signed head of the log has another form", expected=FORMAT)
    numbers = all(type(head[name]) is int and 0 <= head[name] < END_OF_TIME for name in ("length", "time"))
    if not numbers or not matches(DIGEST, head["head"]):
        raise FormatError("signed head of the log with a field of a wrong form")
    try:
        signature = base64.b64decode(head["signature"], validate=True)
    except (TypeError, ValueError):
        signature = b""
    if base64.b64encode(signature).decode() != head["signature"] or len(signature) != 64:
        raise FormatError("signature of the log is not the base64 of 64 bytes")
    signed = encode({name: head[name] for name in _HEAD_FIELDS - {"signature"}})
    if enclave is not None and not enclave.verify(signature, _CONTEXT, signed):
        hint = "the copy was changed, or it is the log of another enclave"
        raise SealError("the log is not signed by this enclave", expected=enclave.fingerprint, hint=hint)
    return int(head["length"])
