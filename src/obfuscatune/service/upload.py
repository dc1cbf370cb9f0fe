"""One upload into the store: a party's file on its way in, in parts, verified when it is whole."""

import hashlib
import threading
import time
from pathlib import Path
from typing import Protocol

from obfuscatune.durable import private, rename, sync
from obfuscatune.errors import FormatError, ProtocolError, SealError, StorageError
from obfuscatune.parties.sealed.fields import HASH_BYTES, TAG_BYTES
from obfuscatune.parties.sealed.header import SignedHeader, open_file, read_exactly, read_header

ABANDONED_SECONDS = 24 * 3600
LATER = "it can go on from here when the disk has room again"


class Keeper(Protocol):
    """The store, as an upload needs it."""

    directory: Path

    def count(self, upload: "Upload", taken: int) -> None:
        """Count bytes that are about to be written."""
        ...

    def took(self, upload: "Upload") -> None:
        """Count a whole file."""
        ...


class Upload:
    """A file on its way in, one for each digest and party, whose connections share it. Made by :meth:`Store.begin`."""

    def __init__(self, store: Keeper, digest: str, size: int, party: str) -> None:
        self.digest, self.size, self.party = digest, size, party
        self._store = store
        self._lock, self._ended = threading.Lock(), False
        self._part = store.directory / f"{digest}.{size}.{party}.part"
        self._whole = store.directory / f"{digest}.sealed"
        # Follows no link: one that the disk's owner left in its place would lead an upload to anywhere on this machine.
        with open(self._part, "ab", opener=private) as file:
            self._offset = file.tell() if file.tell() <= size else 0
            if file.tell() > size:  # and not else: it would make an abandoned one young
                file.truncate(0)
        self.taken = self._offset  # bytes that count: with those that are being written

    @property
    def offset(self) -> int:
        """Bytes that are there already: where the next write goes."""
        return self._offset

    @property
    def ended(self) -> bool:
        """Whether it was finished, refused or aborted."""
        return self._ended

    def write(self, offset: int, data: bytes) -> None:
        """Append ``data``, which begins at ``offset``.

        Raises:
            ProtocolError: another offset than :attr:`offset`, more than was announced, or the upload has ended.
            UsageError: no room is left for the party. StorageError: the disk refuses. The upload can go on then, at
                :attr:`offset`.
        """
        with self._lock:
            self._require_alive()
            if offset != self._offset:
                raise ProtocolError("part of an upload at another offset", got=offset, expected=self._offset)
            if len(data) > self.size - offset:
                got = f"{offset + len(data)} bytes"
                raise ProtocolError("upload is longer than announced", got=got, expected=f"{self.size}")
            self._store.count(self, offset + len(data))
            try:
                with open(self._part, "r+b", buffering=0, opener=private) as file:
                    file.truncate(offset)  # what a write left that failed half way
                    file.seek(offset)
                    left = memoryview(data)
                    while left:
                        left = left[file.write(left) :]
            except OSError as error:
                self.taken = offset
                raise disk_fault("cannot store a part of an upload", error, self._part) from None
            self._offset += len(data)

    def finish(self) -> Path:
        """Verify the whole file and take it in; return its path.

        Raises:
            ProtocolError: parts are missing; it can go on.
            FormatError: it is no sealed file; nothing of it is kept.
            SealError: it is another one than announced, or was changed; nothing of it is kept.
        """
        with self._lock:
            self._require_alive()
            if self._offset != self.size:
                raise ProtocolError("upload is not whole", got=f"{self._offset} bytes", expected=f"{self.size}")
            try:
                signed = read_header(self._part)
                if signed.digest != self.digest:
                    raise SealError("upload is another file", got=signed.digest, expected=self.digest)
                _check_chunks(self._part, signed)
            except FormatError:
                self._drop()
                raise
            try:
                sync(self._part)
                rename(self._part, self._whole)
            except OSError as error:
                raise disk_fault("cannot store an upload", error, self._whole) from None
            self._ended = True
            self._store.took(self)
            return self._whole

    def abort(self) -> None:
        """Forget the upload and what has come of it."""
        with self._lock:
            if not self._ended:
                self._drop()

    def abandoned(self) -> bool:
        """Whether nothing has come for a day; its room is given back then."""
        try:
            return time.time() - self._part.stat().st_mtime > ABANDONED_SECONDS
        except FileNotFoundError:
            return False  # it ended meanwhile

    def _require_alive(self) -> None:
        if self._ended:
            raise ProtocolError("upload has ended", hint="begin it again")

    def _drop(self) -> None:
        self._ended, self.taken = True, 0
        try:
            self._part.unlink(missing_ok=True)
        except OSError as error:
            raise disk_fault("cannot remove an upload", error, self._part) from None


def _check_chunks(path: Path, signed: SignedHeader) -> None:
    """Compare every chunk with the signed table, so that nobody can occupy a digest with a damaged file."""
    header, offset = signed.header, signed.payload_offset
    buffer = bytearray(header.chunk_size(0) + TAG_BYTES)
    with open_file(path) as file:
        for index in range(header.chunks):
            chunk = memoryview(buffer)[: header.chunk_size(index) + TAG_BYTES]
            read_exactly(file, offset, chunk, "upload")
            offset += len(chunk)
            if hashlib.sha256(chunk).digest() != signed.table[index * HASH_BYTES : (index + 1) * HASH_BYTES]:
                raise SealError("upload was changed", got=f"chunk {index} that is not the one in the signed table")


def disk_fault(what: str, error: OSError, path: Path) -> StorageError:
    """Return what to raise where the disk refuses."""
    return StorageError(what, got=error.strerror, where=str(path), hint=LATER)
