"""Named files in one sealed payload: all sealed in one pass, each read on its own."""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from obfuscatune.errors import FormatError, UsageError
from obfuscatune.parties.identity import Identity, PublicIdentity
from obfuscatune.parties.sealed.contents import LENGTH, MAX_TABLE_BYTES, Entry, decode_contents, encode_contents
from obfuscatune.parties.sealed.fields import CHUNK_SIZES, Kind
from obfuscatune.parties.sealed.reader import SealedReader
from obfuscatune.parties.sealed.writer import SealedWriter

COPY_BYTES = 1 << 20


def seal_files(
    path: Path,
    files: Mapping[str, Path | bytes],
    *,
    kind: Kind,
    sender: Identity,
    recipients: Sequence[PublicIdentity],
    terms: dict[str, Any] | None = None,
    progress: bool = False,
    chunk_bytes: int = CHUNK_SIZES[-1],
) -> str:
    """Seal ``files``, by name, from disk or memory, and return the digest; otherwise as `SealedWriter`.

    Raises:
        UsageError: a file cannot be read, is no regular file, or changes its size meanwhile.
        FormatError: a name or an argument that no reader would take. ObfuscatuneError: the disk refuses.
    """
    sizes = {name: len(file) if isinstance(file, bytes) else _size(file) for name, file in files.items()}
    contents = encode_contents(sizes)
    total = len(contents) + sum(sizes.values())
    writer = SealedWriter(
        path,
        kind=kind,
        sender=sender,
        recipients=recipients,
        payload_bytes=total,
        terms=terms,
        chunk_bytes=chunk_bytes,
    )
    with writer, progress_bar("seal", total, progress) as bar:
        writer.write(contents)
        for name, file in files.items():
            if isinstance(file, bytes):
                writer.write(file)
                bar.update(len(file))
            else:
                _copy(file, sizes[name], writer, bar)
    return writer.digest


class SealedArchive:
    """The files in the payload of ``reader``; it lasts as long as the reader is open.

    Raises:
        FormatError: a payload that is no archive; SealError as the reader does.
    """

    def __init__(self, reader: SealedReader) -> None:
        self._reader = reader
        if reader.payload_bytes < LENGTH.size:
            raise FormatError("payload is no archive")
        (length,) = LENGTH.unpack(reader.read(0, LENGTH.size))
        if length > min(MAX_TABLE_BYTES, reader.payload_bytes - LENGTH.size):
            raise FormatError("table of contents is too long", got=length, expected=f"at most {MAX_TABLE_BYTES} bytes")
        self._entries = decode_contents(reader.read(LENGTH.size, length), reader.payload_bytes)

    def names(self) -> list[str]:
        """Return the names, in the order of the payload."""
        return list(self._entries)

    def size(self, name: str) -> int:
        """Return the bytes of a file; raises FormatError where there is none of that name."""
        return self._entry(name).size

    def open(self, name: str) -> io.BufferedReader:
        """Return a file for reading, seekable. Secret."""
        return io.BufferedReader(_Member(self._reader, self._entry(name)))

    def read(self, name: str, max_bytes: int) -> bytes:
        """Return the whole of a small file. Secret. Raises FormatError for one longer than ``max_bytes``."""
        entry = self._entry(name)
        if entry.size > max_bytes:
            raise FormatError(f"{name} is too long", got=f"{entry.size} bytes", expected=f"at most {max_bytes}")
        return self._reader.read(entry.offset, entry.size)

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise FormatError("no such file in the sealed file", got=repr(name))
        return self._entries[name]


class _Member(io.RawIOBase):
    """One file of an archive, for io's own buffering."""

    def __init__(self, reader: SealedReader, entry: Entry) -> None:
        self._reader, self._entry, self._position = reader, entry, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._entry.size}[whence]
        if base + offset < 0:
            raise ValueError("negative seek position")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = min(len(view), max(0, self._entry.size - self._position))
        if count:  # a position behind the end is none of the payload
            self._reader.read_into(self._entry.offset + self._position, view[:count])
        self._position += count
        return count


def progress_bar(what: str, total: int, shown: bool) -> "tqdm[Any]":
    """Return a bar over bytes, on stderr."""
    return tqdm(desc=what, total=total, unit="B", unit_scale=True, unit_divisor=1000, disable=not shown, leave=False)


def _size(path: Path) -> int:
    try:
        if path.is_symlink() or not path.is_file():
            raise UsageError("cannot seal what is no regular file", where=str(path))
        return path.stat().st_size
    except OSError as error:
        raise UsageError("cannot read a file to seal", got=error.strerror, where=str(path)) from None


def _copy(path: Path, size: int, writer: SealedWriter, bar: "tqdm[Any]") -> None:
    buffer, done = memoryview(bytearray(min(size, COPY_BYTES))), 0
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise UsageError("cannot read a file to seal", got=error.strerror, where=str(path)) from None
    with file:
        while done < size:
            try:
                count = file.readinto(buffer[: size - done]) or 0
            except OSError as error:
                raise UsageError("cannot read a file to seal", got=error.strerror, where=str(path)) from None
            if not count:
                break
            writer.write(buffer[:count])
            bar.update(count)
            done += count
        if done != size or os.fstat(file.fileno()).st_size != size:
            raise UsageError("file changed while it was sealed", where=str(path))
