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
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from obfuscatune.durable import rename, sync
from obfuscatune.errors import FormatError, SealError, StorageError, UsageError
from obfuscatune.parties.sealed.fields import Kind
from obfuscatune.parties.sealed.header import read_header
from obfuscatune.service.entries import DIGEST, matches
from obfuscatune.service.shares import Parties, room_for
from obfuscatune.service.upload import LATER, Upload, disk_fault

_KEPT_FREE = 64 << 20  # bytes of the disk for the state and the log, which must never be refused
_PART = re.compile(r"[0-9a-f]{64}\.[0-9]{1,19}\.[0-9a-f]{64}\.part")
_WHOLE = re.compile(r"([0-9a-f]{64})\.sealed")


class Store:
    """Sealed files by digest. Every method may be called from several threads.

    Args:
        directory: made if missing, mode 0700; for one store at a time (the state's lock file sees to that).
        max_bytes: what uploads may fill it up to, the enclave's own files counted. Those are never refused by it, since
            a party must not be able to stop a job by filling the store.
        parties: who shares it; never called with the store's lock held, since it may need another.
    """

    def __init__(self, directory: Path, max_bytes: int, parties: Parties = tuple) -> None:
        self.directory, self.max_bytes, self._parties = directory, max_bytes, parties
        self._own = directory / "own"
        self._lock = threading.RLock()  # of the three below; comes after the state's, see `State.lock`
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
        parties = self._parties()
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
            self._require_room(party, size, parties)
            try:
                upload = Upload(self, digest, size, party)
            except OSError as error:
                raise disk_fault("cannot begin an upload", error, path) from None
            self._uploads[digest, party] = upload
            return upload

    def count(self, upload: Upload, taken: int) -> None:
        """Count bytes of an upload that are about to be written; raises as `Upload.write`."""
        parties = self._parties()
        with self._lock:
            self._require_room(upload.party, taken - upload.taken, parties)
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
        return self._room(party, self._parties())

    def _room(self, party: str, parties: Sequence[str]) -> int:
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
            return room_for(party, total=self.max_bytes, taken=taken, used=used, parties=parties)

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
                raise disk_fault("cannot store a file", error, path) from None
            with self._lock:
                self._sizes[signed.digest] = size
        except OSError as error:
            raise disk_fault("cannot write a file", error, path) from None
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
        with self._lock:
            self._sizes.pop(digest, None)
            self._owners.pop(digest, None)
        try:
            self._name(digest).unlink(missing_ok=True)
        except OSError as error:
            raise disk_fault("cannot remove a file", error, self._name(digest)) from None

    def _name(self, digest: str) -> Path:
        if not matches(DIGEST, digest):
            raise FormatError("digest of a sealed file", expected="64 hex digits, in small letters")
        return self.directory / f"{digest}.sealed"

    def _require_room(self, party: str, size: int, parties: Sequence[str]) -> None:
        room = self._room(party, parties)
        if size > room:
            hint = (
                "fetch the results of earlier jobs: what was fetched makes room; or wait until others' jobs have ended"
            )
            raise UsageError("no room in the store", got=f"{size} bytes", expected=f"at most {room}", hint=hint)
        self.require_disk(size)

    def require_disk(self, size: int) -> None:
        """Raise StorageError unless the disk has room for ``size`` bytes, and beside them for state and log."""
        if shutil.disk_usage(self.directory).free < size + _KEPT_FREE:
            raise StorageError("no room on the disk of the store", got=f"{size} bytes", hint=LATER)

    def _remove_abandoned(self) -> None:
        # An upload's own lock is held while its file is verified: never wait for it with the store's.
        with self._lock:
            self._uploads = {key: upload for key, upload in self._uploads.items() if not upload.ended}
            uploads = list(self._uploads.values())
        for upload in uploads:
            if upload.abandoned():
                upload.abort()
