"""The store of sealed files on the operator's disk, by digest.

    DIGEST.sealed           a whole file, whose signature, digest and chunks were verified when it came in
    DIGEST.SIZE.part        an upload of SIZE bytes, as far as it has come
    own/                    files that the enclave itself is writing

What is in it is sealed, so the disk may belong to anybody; it may also change it at any time, so whoever opens a file
verifies it again. Digests are the only part of a name that a party chooses, and they are 64 hex digits.
"""

import hashlib
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from obfuscatune.durable import private, rename, sync
from obfuscatune.errors import FormatError, ObfuscatuneError, ProtocolError, SealError, UsageError
from obfuscatune.parties.sealed.fields import HASH_BYTES, TAG_BYTES, Kind
from obfuscatune.parties.sealed.header import SignedHeader, open_file, read_exactly, read_header
from obfuscatune.service.entries import DIGEST, matches

ABANDONED_SECONDS = 24 * 3600
_KEPT_FREE = 64 << 20  # bytes of the disk for the state and the log, which must never be refused
_PART = re.compile(r"[0-9a-f]{64}\.[0-9]{1,19}\.part")


class Upload:
    """A file on its way in, one for each digest; several connections may share it. Made by :meth:`Store.begin`."""

    def __init__(self, directory: Path, digest: str, size: int) -> None:
        self.digest, self.size = digest, size
        self._lock, self._ended = threading.Lock(), False
        self._part, self._whole = directory / f"{digest}.{size}.part", directory / f"{digest}.sealed"
        # Follows no link: one that the disk's owner left in its place would lead an upload to anywhere on this machine.
        with open(self._part, "ab", opener=private) as file:
            self._offset = file.tell() if file.tell() <= size else 0
            file.truncate(self._offset)

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
            ObfuscatuneError: the disk refuses; the upload can go on at :attr:`offset`.
        """
        with self._lock:
            self._require_alive()
            if offset != self._offset:
                raise ProtocolError("part of an upload at another offset", got=offset, expected=self._offset)
            if len(data) > self.size - offset:
                got = f"{offset + len(data)} bytes"
                raise ProtocolError("upload is longer than announced", got=got, expected=f"{self.size}")
            try:
                with open(self._part, "r+b", buffering=0, opener=private) as file:
                    file.truncate(offset)  # what a write left that failed half way
                    file.seek(offset)
                    left = memoryview(data)
                    while left:
                        left = left[file.write(left) :]
            except OSError as error:
                raise _fault("cannot store a part of an upload", error, self._part) from None
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
                raise _fault("cannot store an upload", error, self._whole) from None
            self._ended = True
            return self._whole

    def abort(self) -> None:
        """Forget the upload and what has come of it."""
        with self._lock:
            if not self._ended:
                self._drop()

    def _require_alive(self) -> None:
        if self._ended:
            raise ProtocolError("upload has ended", hint="begin it again")

    def _drop(self) -> None:
        self._ended = True
        try:
            self._part.unlink(missing_ok=True)
        except OSError as error:
            raise _fault("cannot remove an upload", error, self._part) from None


class Store:
    """Sealed files by digest. Every method may be called from several threads.

    Args:
        directory: made if missing, mode 0700; for one store at a time (the state's lock file sees to that).
        max_bytes: what uploads may fill it up to, the enclave's own files counted. Those are never refused, since a
            party must not be able to stop a job by filling the store.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.directory, self.max_bytes = directory, max_bytes
        self._own = directory / "own"
        self._uploads: dict[str, Upload] = {}
        self._lock = threading.RLock()
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            shutil.rmtree(self._own, ignore_errors=True)
            self._own.mkdir(mode=0o700)
            self._remove_abandoned()
        except OSError as error:
            raise UsageError("cannot use the store", got=error.strerror, where=str(directory)) from None

    def begin(self, digest: str, size: int) -> Upload:
        """Begin or go on with the upload of the file ``digest``, of ``size`` bytes, if there is room for all of it.

        Raises:
            FormatError: no digest. UsageError: it is there already, or there is no room.
        """
        path = self._name(digest)
        if type(size) is not int or size <= 0:
            raise FormatError("size of an upload", got=repr(size) if type(size) is int else type(size).__name__)
        with self._lock:
            if path.exists():
                raise UsageError("file is in the store already", where=digest)
            found = self._uploads.get(digest)
            if found is not None and not found.ended:
                if found.size == size:
                    return found
                found.abort()
            try:
                self._remove_abandoned()
                for other in self.directory.glob(f"{digest}.*.part"):
                    if other.name != f"{digest}.{size}.part":
                        other.unlink()
                self._require_room(digest, size)
                upload = Upload(self.directory, digest, size)
            except OSError as error:
                raise _fault("cannot begin an upload", error, path) from None
            self._uploads[digest] = upload
            return upload

    def put(self, kind: Kind, write: Callable[[Path], str]) -> str:
        """Take in a file that the enclave makes; return its digest.

        Args:
            kind: what it must be.
            write: called with a path that is free; seals the file there and returns its digest.

        Raises:
            SealError: of another kind, or exchanged on the disk. Whatever ``write`` raises. Nothing is kept then.
        """
        path = self._own / secrets.token_hex(16)
        try:
            digest = write(path)
            signed = read_header(path)
            if signed.digest != digest:  # anybody can seal to the enclave: a checkpoint, with keys that he knows
                raise SealError("a sealed file was exchanged on the disk", got=signed.digest, expected=digest)
            if signed.header.kind != kind:
                raise SealError("sealed file of another kind", got=signed.header.kind, expected=kind)
            try:
                sync(path)
                rename(path, self._name(signed.digest))
            except OSError as error:
                raise _fault("cannot store a file", error, path) from None
        finally:
            path.unlink(missing_ok=True)
        return signed.digest

    def has(self, digest: str) -> bool:
        """Return whether the file is here; raises FormatError for what is no digest."""
        return self._name(digest).is_file()

    def path(self, digest: str) -> Path:
        """Return where the file is; raises UsageError where it is not here, FormatError for what is no digest."""
        if not self.has(digest):
            raise UsageError("no such file in the store", got=digest, hint="upload it first")
        return self._name(digest)

    def digests(self) -> list[str]:
        """Return the digests of the whole files that are here."""
        return [path.stem for path in self.directory.glob("*.sealed") if matches(DIGEST, path.stem)]

    def remove(self, digest: str) -> None:
        """Remove the file if it is here; raises FormatError for what is no digest."""
        try:
            self._name(digest).unlink(missing_ok=True)
        except OSError as error:
            raise _fault("cannot remove a file", error, self._name(digest)) from None

    def _name(self, digest: str) -> Path:
        if not matches(DIGEST, digest):
            raise FormatError("digest of a sealed file", expected="64 hex digits, in small letters")
        return self.directory / f"{digest}.sealed"

    def _require_room(self, digest: str, size: int) -> None:
        """Count announced uploads in full, so that two which begin together cannot both take the last room."""
        used = outstanding = 0
        for entry in os.scandir(self.directory):
            try:
                there = entry.stat(follow_symlinks=False).st_size if entry.is_file(follow_symlinks=False) else 0
            except FileNotFoundError:
                continue  # an upload ended meanwhile
            if not _PART.fullmatch(entry.name):
                used += there
            elif entry.name.startswith(digest):
                outstanding -= there
            else:
                announced = int(entry.name.split(".")[1])
                used, outstanding = used + announced, outstanding + announced - there
        if used + size > self.max_bytes:
            got, expected = f"{size} bytes", f"at most {max(self.max_bytes - used, 0)}"
            raise UsageError("no room in the store", got=got, expected=expected, hint="remove files of earlier jobs")
        if shutil.disk_usage(self.directory).free < outstanding + size + _KEPT_FREE:
            raise UsageError("no room on the disk of the store", got=f"{size} bytes")

    def _remove_abandoned(self) -> None:
        self._uploads = {digest: upload for digest, upload in self._uploads.items() if not upload.ended}
        for path in self.directory.glob("*.part"):
            if not _PART.fullmatch(path.name):
                continue
            digest = path.name.partition(".")[0]
            try:
                old = time.time() - path.stat().st_mtime > ABANDONED_SECONDS
            except FileNotFoundError:
                continue  # it ended meanwhile
            if old and digest in self._uploads:
                self._uploads[digest].abort()
            elif old:
                path.unlink(missing_ok=True)


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


def _fault(what: str, error: OSError, path: Path) -> ObfuscatuneError:
    return ObfuscatuneError(what, got=error.strerror, where=str(path))
