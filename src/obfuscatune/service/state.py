"""The enclave's state on the operator's disk: sealed, and refused where it is an old copy.

One file, ``state.sealed``:

    "obfuscatune enclave state 4" || 0x00 || version (8 bytes, big endian) || nonce (12) || AES-256-GCM

under HKDF-SHA256(sealing key of the platform, info "obfuscatune enclave state 4"), with magic and version as associated
data. The plain text is canonical JSON: format, version, identity, jobs, members, head and length of the audit log, and
to whom all of it was handed over. The nonce is random and not the version: after a crash the same version is written
again with other content.

Rollback: each commit writes version n + 1 beside, renames, and only then moves the platform's counter from n to n + 1.
A state opens where its version is the counter, or one more (the crash came between rename and counter); everything else
is refused. One more thing is needed. The operator may kill the enclave between rename and counter, keep that file, put
back the one before, and offer the kept one later, when another commit has moved the counter to its number. So an
opening commits what it found at once, and twice: the first write of a process may have siblings of its number, the
second has none. A commit after one that failed is made twice for the same reason. What a commit covers may be acted
upon once :meth:`State.commit` has returned.

A counter alone cannot tell two enclaves that run at once. The lock file keeps an operator from that by accident; one
who does it on purpose can undo a commit. (A second machine cannot where key and counter are the first one's: on
SEV-SNP with a provider's VLEK the key may be that of all its chips, see `snp_key`.) Where the platform has no counter,
any old state opens. The parties see both in the audit log, against their earlier copies.
"""

import base64
import fcntl
import os
import threading
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from obfuscatune.durable import private, rename, write_private
from obfuscatune.errors import FormatError, RollbackError, SealError, StorageError, UsageError
from obfuscatune.parties.attestation.platform import Platform
from obfuscatune.parties.canonical import decode, encode
from obfuscatune.parties.files import read_small
from obfuscatune.parties.identity import ENCLAVE, Identity
from obfuscatune.service.entries import NO_ENTRIES

FORMAT = "obfuscatune enclave state 4"
MAX_BYTES = 16 << 20
NEW_HINT = (
    "if the state's disk is not mounted, or the directory another one, mend that; if the state is lost, `--new` begins "
    "a new enclave, and nothing ever opens what an earlier one had"
)
_MAGIC = FORMAT.encode() + b"\0"
_HEADER_BYTES = len(_MAGIC) + 8
_NONCE_BYTES = 12

IN_MEMORY = (
    "this platform has no sealing key: without --escrow the enclave's identity, its jobs and its log last until it "
    "ends, and what is sealed to it cannot be opened after that"
)
NO_COUNTER = (
    "this platform has no monotonic counter: the enclave cannot tell that an old copy of its state was put back; only "
    "the parties can, who compare the audit log with their earlier copy"
)


class State:
    """What the enclave remembers. Secret: it holds the enclave's identity; no ``repr`` shows any of it.

    Attributes:
        identity: made at the first start, the same ever after.
        jobs: JSON object by job digest; at most 6 levels deep, about 100,000 values in all. Whoever changes it while
            others may commit holds ``lock``.
        members: the chain of memberships, one canonical text a change; empty while it is open.
        former: of enclaves that have handed over to this one, oldest first: see `handover`.
        uses: of each sealed input with a quota of jobs: see `uses`. forgotten: Unix second; whatever expired up to then
            may have been forgotten here, and is over although the clock may say otherwise.
        handed: to whom the state was handed over, and under which statement; empty where it was not.
        log_head: digest of the last entry of the audit log that is committed.
        log_length: number of its entries.
        in_memory: nothing is written, since the platform has no sealing key.
        lock: reentrant. The order of the enclave's locks: whoever holds one takes only such as come after it.

            1. an upload's; and that of a take-over
            2. this one, which is that of the book and of the membership too
            3. the store's, the log's, those of requests, queries and answers, the channel's
            4. the platform's

            Nobody holds two of a row, except that the channel's server takes those of its connections.
    """

    def __init__(self, directory: Path, platform: Platform, key: bytes | None, lock_file: int) -> None:
        self._path, self._counter, self._lock_file = directory / "state.sealed", platform.counter, lock_file
        self._cipher = None if key is None else AESGCM(_derive(key))
        self._version = 0
        self._unconfirmed = True  # there may be files of a next version that no counter has confirmed
        self.identity: Identity
        self.jobs: dict[str, Any] = {}
        self.members: list[str] = []
        self.former: list[dict[str, Any]] = []
        self.uses: dict[str, str] = {}
        self.forgotten = 0
        self.handed: dict[str, str] = {}
        self.log_head, self.log_length = NO_ENTRIES, 0
        self.in_memory = key is None
        self.lock = threading.RLock()

    @classmethod
    def open(cls, directory: Path, platform: Platform, *, new: bool = False) -> "State":
        """Open the state of ``directory``, or begin one at the first start. Close it, or use it in a ``with``.

        Args:
            new: begin one where none is here although the platform's counter was used; the earlier one is lost then.

        Raises:
            RollbackError: not the state that was committed last.
            SealError: changed, or sealed by other code or another platform.
            UsageError: another enclave runs on this directory, or it cannot be used; or no state is here, though there
                was one on this platform.
        """
        lock_file = _take_lock(directory)
        try:
            state = cls(directory, platform, platform.sealing_key(), lock_file)
            state._begin(new)
        except BaseException:
            os.close(lock_file)
            raise
        return state

    def commit(self) -> None:
        """Make the state as it is now the only one that will ever open; see the head of this module.

        Raises:
            RollbackError: somebody else moved the counter.
            FormatError: a job is not JSON, or all of it is too much.
            ObfuscatuneError: the disk or the counter failed; a later commit may succeed.
        """
        with self.lock:
            if self._cipher is None:
                return
            times = 2 if self._unconfirmed and self._counter is not None else 1
            self._unconfirmed = True
            for _ in range(times):
                self._write(self._cipher)
            self._unconfirmed = False

    def close(self) -> None:
        """Let another enclave have the directory. Commits nothing."""
        if self._lock_file >= 0:
            os.close(self._lock_file)
            self._lock_file = -1

    def __enter__(self) -> "State":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"State(version {self._version}, {len(self.jobs)} jobs)"

    def _begin(self, new: bool) -> None:
        there = self._path.exists()
        if self._cipher is None:
            if there:
                hint = "it was written on a platform with a sealing key; start there, or with an empty directory"
                raise UsageError("there is a state that cannot be opened here", where=str(self._path), hint=hint)
            warnings.warn(IN_MEMORY, stacklevel=3)
        elif self._counter is None:
            warnings.warn(NO_COUNTER, stacklevel=3)
        if there:
            self._read()
        else:
            if self._counter is not None and self._cipher is not None:
                if self._counter.used() and not new:
                    # The first commit would move the counter, and no state of before would ever open again.
                    got, where = "no state, though the platform's counter has been used", str(self._path)
                    raise UsageError("the enclave's state is missing", got=got, where=where, hint=NEW_HINT)
                # A TPM's new counter begins above zero. Jobs that were used up stay used up: they name an identity that
                # is gone.
                self._version = self._counter.read()
            self.identity = Identity.generate(ENCLAVE)
        self.commit()

    def _read(self) -> None:
        data = read_small(self._path, MAX_BYTES + _HEADER_BYTES + _NONCE_BYTES + 16, "enclave's state")
        header, nonce = data[:_HEADER_BYTES], data[_HEADER_BYTES : _HEADER_BYTES + _NONCE_BYTES]
        problem: SealError | None = None
        plain = b""
        if len(data) < _HEADER_BYTES + _NONCE_BYTES + 16 or not header.startswith(_MAGIC) or self._cipher is None:
            problem = SealError("file is no state of this version", expected=FORMAT, where=str(self._path))
        else:
            try:
                plain = self._cipher.decrypt(nonce, data[_HEADER_BYTES + _NONCE_BYTES :], header)
            except InvalidTag:
                hint = "changed on the disk, or written by other code or on another platform"
                problem = SealError("the enclave's state does not open", where=str(self._path), hint=hint)
        if problem is not None:
            raise problem
        self._check_version(int.from_bytes(header[-8:], "big"))
        fields = decode(plain, "the enclave's state", max_bytes=MAX_BYTES)
        if fields.get("format") != FORMAT or fields.get("version") != self._version:
            raise FormatError("the enclave's state is of another version", expected=FORMAT, where=str(self._path))
        self._take(fields)

    @property
    def former_identities(self) -> list[Identity]:
        """The identities of enclaves that have handed over to this one: they open what was sealed to those."""
        found = [base64.b64decode(each["identity"]) for each in self.former]
        return [Identity.from_bytes(data, "a former identity of the enclave") for data in found]

    @property
    def fingerprints(self) -> frozenset[str]:
        """Fingerprints by which jobs may name this enclave."""
        identities = [self.identity, *self.former_identities]
        return frozenset(identity.public.fingerprint for identity in identities)

    def fields(self) -> dict[str, Any]:
        """Return all of it but version and format. Secret: what an enclave hands over."""
        return {
            "forgotten": self.forgotten,
            "former": self.former,
            "handed": self.handed,
            "identity": base64.b64encode(self.identity.to_bytes()).decode(),
            "jobs": self.jobs,
            "log_head": self.log_head,
            "log_length": self.log_length,
            "members": self.members,
            "uses": self.uses,
        }

    def _take(self, fields: dict[str, Any]) -> None:
        self.identity = Identity.from_bytes(base64.b64decode(fields["identity"]), "the enclave's identity")
        self.jobs, self.log_head, self.log_length = fields["jobs"], fields["log_head"], fields["log_length"]
        self.members, self.handed, self.former = fields["members"], fields["handed"], fields["former"]
        self.uses, self.forgotten = fields["uses"], fields["forgotten"]

    def _check_version(self, version: int) -> None:
        self._version = version
        if self._counter is None:
            return
        count = self._counter.read()
        if version == count + 1:  # the crash came after the rename
            count = self._counter.increment()
        if version != count:
            age = "older" if version < count else "newer"
            raise RollbackError(
                f"the enclave's state is {age} than the platform's counter says",
                got=f"version {version}",
                expected=f"version {count}",
                where=str(self._path),
                hint="somebody put back an old copy of the state" if version < count else "the counter is another one",
            )

    def _write(self, cipher: AESGCM) -> None:
        version = self._version + 1
        fields = {
            "format": FORMAT,
            "version": version,
            **self.fields(),
        }
        plain = encode(fields)
        if len(plain) > MAX_BYTES:
            raise FormatError("the enclave's state is too long", got=f"{len(plain)} bytes", expected=f"<= {MAX_BYTES}")
        if self._counter is not None and self._counter.read() != self._version:
            raise self._counter_moved()
        header, nonce = _MAGIC + version.to_bytes(8, "big"), os.urandom(_NONCE_BYTES)
        beside = self._path.with_suffix(".new")
        try:
            write_private(beside, header + nonce + cipher.encrypt(nonce, plain, header))
            rename(beside, self._path)
        except OSError as error:
            raise _disk_fault(error, self._path) from None
        if self._counter is not None and self._counter.increment() != version:
            raise self._counter_moved()
        self._version = version

    def _counter_moved(self) -> RollbackError:
        return RollbackError(
            "the platform's counter was moved by somebody else",
            where=str(self._path),
            hint="one counter is for one enclave; stop all of them and start one",
        )


def _derive(key: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=FORMAT.encode()).derive(key)


def _take_lock(directory: Path) -> int:
    path = directory / "state.lock"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = private(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise UsageError("cannot use the enclave's directory", got=error.strerror, where=str(directory)) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        hint = "stop it, or give this one a directory of its own"
        raise UsageError("an enclave runs on this directory already", where=str(directory), hint=hint) from None
    return handle


def _disk_fault(error: OSError, path: Path) -> StorageError:
    return StorageError("cannot write the enclave's state", got=error.strerror, where=str(path))
