"""The store of sealed files on the operator's disk, by digest.

    DIGEST.sealed           a whole file, whose signature, digest and chunks were verified when it came in
    DIGEST.SIZE.PARTY.part  a party's upload of SIZE bytes, as far as it has come
    own/                    files that the enclave itself is writing

What is in it is sealed, so the disk may belong to anybody; it may also change it at any time, so whoever opens a file
verifies it again. Digests are the only part of a name that a party chooses, and they are 64 hex digits.

Uploads are of one party each: nobody can spoil or end another's by its digest. They reserve nothing; what has come
counts, against the party's share (`shares`).
"""

import contextlib
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
from obfuscatune.errors import FormatError, ProtocolError, SealError, StorageError, UsageError
from obfuscatune.parties.sealed.fields import HASH_BYTES, TAG_BYTES, Kind
from obfuscatune.parties.sealed.header import SignedHeader, open_file, read_exactly, read_header
from obfuscatune.service.entries import DIGEST, matches
from obfuscatune.service.shares import Parties, room_for

ABANDONED_SECONDS = 24 * 3600
_LATER = "it can go on from here when the disk has room again"
_KEPT_FREE = 64 << 20  # bytes of the disk for the state and the log, which must never be refused
_PART = re.compile(r"[0-9a-f]{64}\.[0-9]{1,19}\.[0-9a-f]{64}\.part")
_WHOLE = re.compile(r"([0-9a-f]{64})\.sealed")


class Upload:
    """A file on its way in, one for each digest and party, whose connections share it. Made by :meth:`Store.begin`."""

    def __init__(self, store: "Store", digest: str, size: int, party: str) -> None:
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
            raise _fault("cannot remove an upload", error, self._part) from None


class Store:
    """Sealed files by digest. Every method may be called from several threads.

    Args:
        directory: made if missing, mode 0700; for one store at a time (the state's lock file sees to that).
        max_bytes: what uploads may fill it up to, the enclave's own files counted. Those are never refused by it, since
            a party must not be able to stop a job by filling the store.
        parties: who shares it.
    """

    def __init__(self, directory: Path, max_bytes: int, parties: Parties = tuple) -> None:
        self.directory, self.max_bytes, self._parties = directory, max_bytes, parties
        self._own = directory / "own"
        self._lock = threading.RLock()  # of the three below
        self._uploads: dict[tuple[str, str], Upload] = {}  # by digest and party
        self._sizes: dict[str, int] = {}
        self._owners: dict[str, set[str]] = {}  # of whole files: who is charged for it
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            shutil.rmtree(self._own, ignore_errors=True)
            self._own.mkdir(mode=0o700)
            for entry in os.scandir(directory):
                if (match := _WHOLE.fullmatch(entry.name)) and entry.is_file(follow_symlinks=False):
                    self._sizes[match[1]] = entry.stat(follow_symlinks=False).st_size
                elif _PART.fullmatch(entry.name):
                    digest, size, party, _ = entry.name.split(".")
                    self._adopt(digest, int(size), party)
            self._remove_abandoned()
        except OSError as error:
            raise UsageError("cannot use the store", got=error.strerror, where=str(directory)) from None

    def _adopt(self, digest: str, size: int, party: str) -> None:
        """Take up an upload where an earlier enclave has left it; what is no part of one counts for nobody."""
        with contextlib.suppress(OSError):
            upload = Upload(self, digest, size, party)
            self._uploads[digest, party] = upload

    def begin(self, digest: str, size: int, party: str) -> Upload:
        """Begin or go on with a party's upload of the file ``digest``, of ``size`` bytes, if it would fit now.

        Raises:
            FormatError: no digest. UsageError: there already, or no room. StorageError: the disk refuses.
        """
        path = self._name(digest)
        if type(size) is not int or size <= 0:
            raise FormatError("size of an upload", got=repr(size) if type(size) is int else type(size).__name__)
        if not matches(DIGEST, party):
            raise FormatError("party of an upload", expected="64 hex digits")
        self._remove_abandoned()
        with self._lock:
            found = self._uploads.get((digest, party))
        if found is not None and found.size != size:
            found.abort()
        with self._lock:
            if path.exists():
                raise UsageError("file is in the store already", where=digest)
            found = self._uploads.get((digest, party))
            if found is not None and not found.ended:
                return found
            self._require_room(party, size)
            try:
                upload = Upload(self, digest, size, party)
            except OSError as error:
                raise _fault("cannot begin an upload", error, path) from None
            self._uploads[digest, party] = upload
            return upload

    def count(self, upload: Upload, taken: int) -> None:
        """Count bytes of an upload that are about to be written; raises as `Upload.write`."""
        with self._lock:
            self._require_room(upload.party, taken - upload.taken)
            upload.taken = taken

    def took(self, upload: Upload) -> None:
        """Count an upload as a whole file of its party."""
        with self._lock:
            self._uploads.pop((upload.digest, upload.party), None)
            self._sizes[upload.digest] = upload.size
            self.charge(upload.digest, upload.party)

    def charge(self, digest: str, *parties: str) -> None:
        """Let a file count for these parties, too, as long as it is here."""
        with self._lock:
            if digest in self._sizes:
                self._owners.setdefault(digest, set()).update(parties)

    def room(self, party: str) -> int:
        """Return the bytes that a party may still take of the store; whether the disk has them is another question."""
        with self._lock:
            used: dict[str, int] = {}
            for digest, owners in self._owners.items():
                for owner in owners:
                    used[owner] = used.get(owner, 0) + self._sizes[digest]
            parts = 0
            for upload in self._uploads.values():
                used[upload.party] = used.get(upload.party, 0) + upload.taken
                parts += upload.taken
            taken = sum(self._sizes.values()) + parts
            return room_for(party, total=self.max_bytes, taken=taken, used=used, parties=self._parties())

    def remove_unnamed(self, named: set[str]) -> None:
        """Remove the whole files that are not in ``named``."""
        with self._lock:
            for digest in [digest for digest in self._sizes if digest not in named]:
                self.remove(digest)

    def put(self, kind: Kind, write: Callable[[Path], str]) -> str:
        """Take in a file that the enclave makes; return its digest.

        Args:
            kind: what it must be.
            write: called with a path that is free; seals the file there and returns its digest.

        Raises:
            SealError: of another kind, or exchanged on the disk. StorageError: the disk is full, or refuses. Whatever
                else ``write`` raises. Nothing is kept then.
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
                self.require_disk(0)  # what is written is no less room than what is left for the state and the log
                sync(path)
                size = path.stat().st_size
                rename(path, self._name(signed.digest))
            except OSError as error:
                raise _fault("cannot store a file", error, path) from None
            with self._lock:
                self._sizes[signed.digest] = size
        except OSError as error:
            raise _fault("cannot write a file", error, path) from None
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

    def remove(self, digest: str) -> None:
        """Remove the file if it is here; raises FormatError for what is no digest."""
        with self._lock:
            self._sizes.pop(digest, None)
            self._owners.pop(digest, None)
        try:
            self._name(digest).unlink(missing_ok=True)
        except OSError as error:
            raise _fault("cannot remove a file", error, self._name(digest)) from None

    def _name(self, digest: str) -> Path:
        if not matches(DIGEST, digest):
            raise FormatError("digest of a sealed file", expected="64 hex digits, in small letters")
        return self.directory / f"{digest}.sealed"

    def _require_room(self, party: str, size: int) -> None:
        room = self.room(party)
        if size > room:
            hint = (
                "fetch the results of earlier jobs: what was fetched makes room; or wait until others' jobs have ended"
            )
            raise UsageError("no room in the store", got=f"{size} bytes", expected=f"at most {room}", hint=hint)
        self.require_disk(size)

    def require_disk(self, size: int) -> None:
        """Raise StorageError unless the disk has room for ``size`` bytes, and beside them for state and log."""
        if shutil.disk_usage(self.directory).free < size + _KEPT_FREE:
            raise StorageError("no room on the disk of the store", got=f"{size} bytes", hint=_LATER)

    def _remove_abandoned(self) -> None:
        # An upload's own lock is held while its file is verified: never wait for it with the store's.
        with self._lock:
            self._uploads = {key: upload for key, upload in self._uploads.items() if not upload.ended}
            uploads = list(self._uploads.values())
        for upload in uploads:
            if upload.abandoned():
                upload.abort()


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


def _fault(what: str, error: OSError, path: Path) -> StorageError:
    return StorageError(what, got=error.strerror, where=str(path), hint=_LATER)
