"""What the book keeps of a job: a short record in the sealed state, and the signed job in a file beside it.

The file is not secret, and its name is its digest: it is verified, signatures too, whenever the book is opened. So the
state stays short however many jobs there were, and a commit as quick.
"""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from obfuscatune.durable import private, rename, write_private
from obfuscatune.errors import ConsentError, FormatError, StorageError, UsageError
from obfuscatune.parties.job import MAX_JOB_BYTES, SignedJob
from obfuscatune.parties.vocabulary import Role

# Of one record in the state, and of one whose job is retired: what a party's share is counted by. More than their
# length: a canonical text has a limit of values too, of which they have 78 and 20, and 9 of each further worker.
RECORD_BYTES, RETIRED_BYTES, WORKER_BYTES = 7168, 1792, 1024
WORKERS = 4  # that a record has room for without more
USED_UP = ("done", "refused", "cancelled", "deleted")  # nothing makes it run again
ENDED = (*USED_UP, "failed")  # submitted again, this one resumes


@dataclass(frozen=True)
class Record:
    """One job in the book.

    Attributes:
        order: its place in the queue. provider, owner: fingerprints. expires: Unix seconds.
        status: as in the drawing at the head of `book`. reason: why it was refused or failed: an error's class.
        step, steps: how far the training is, and where it ends. checkpoint, checkpoint_step: digest and
            step of the last one.
        results: digests of sealed results, by kind. queries: prompts answered so far. counted: digests of the
            questions that were counted last, see `Questions.count`. answering: seconds that the job has stood still
            for queries of others. starts: since the last checkpoint. workers: what each has got of the model, as
            `placement` tells. cancelled: whether a party has asked for the end of a running job, or has left since a
            job was done.
        named: how many workers the job names.
        ended: Unix second. fetched: "role kind" of results that were fetched whole.
        used: whether it counts among the jobs of its inputs, see `uses`.
        retired: its files have made room for others'; nothing but this record is left.
    """

    order: int
    provider: str
    owner: str
    expires: int
    status: str = "waiting"
    reason: str = ""
    step: int = 0
    steps: int = 0
    checkpoint: str | None = None
    checkpoint_step: int = 0
    results: dict[str, str] = field(default_factory=dict)
    queries: int = 0
    counted: str = ""  # one value, not several: see above
    answering: int = 0
    starts: int = 0
    workers: list[dict[str, Any]] = field(default_factory=list)
    cancelled: bool = False
    named: int = 0
    ended: int = 0
    fetched: tuple[str, ...] = ()
    used: bool = False
    retired: bool = False

    @property
    def parties(self) -> tuple[str, str]:
        """Fingerprints of provider and owner."""
        return self.provider, self.owner

    @property
    def answers_no_more(self) -> bool:
        """Whether one of its parties has left since it was done: whoever is admitted again does not get it back."""
        return self.cancelled and self.status == "done"

    @property
    def bytes(self) -> int:
        """What it counts in the state."""
        return RETIRED_BYTES if self.retired else bytes_of(self.named)

    def to_fields(self) -> dict[str, Any]:
        """Return the canonical fields: those that are not as at the beginning."""
        values = asdict(self) | {"fetched": list(self.fetched)}
        return {name: value for name, value in values.items() if name not in _DEFAULTS or value != _DEFAULTS[name]}

    @classmethod
    def from_fields(cls, values: dict[str, Any]) -> "Record":
        """Return the record of ``to_fields``."""
        return cls(**{**values, "fetched": tuple(values.get("fetched", ()))})


_EMPTY = Record(0, "", "", 0)
_DEFAULTS = {
    item.name: list(value) if isinstance(value := getattr(_EMPTY, item.name), tuple) else value
    for item in fields(Record)
    if item.name not in ("order", "provider", "owner", "expires")
}


def bytes_of(workers: int) -> int:
    """Return what a record counts whose job names so many workers."""
    return RECORD_BYTES + WORKER_BYTES * max(0, workers - WORKERS)


def recipients(signed: SignedJob, kind: str) -> tuple[Role, ...]:
    """Return the roles that a job gives a result to; what tells how the training went, the owner of the data alone."""
    return {"adapter": signed.job.adapter_to, "output": signed.job.generations_to, "report": ("owner",)}[kind]


def unfetched(record: Record, signed: SignedJob) -> list[str]:
    """Return "role kind" of the results that somebody may still fetch."""
    wanted = [f"{role} {kind}" for kind in record.results for role in recipients(signed, kind)]
    return [name for name in wanted if name not in record.fetched]


class JobFiles:
    """The signed jobs on the disk; the directory is made if missing."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError("cannot use the store", got=error.strerror, where=str(directory)) from None

    def write(self, signed: SignedJob) -> None:
        """Keep a signed job, on the disk when this returns; raises StorageError."""
        path = self._path(signed.job.digest)
        beside = path.with_suffix(".new")
        try:
            write_private(beside, signed.to_bytes())
            rename(beside, path)
        except OSError as error:
            raise StorageError("cannot store a job", got=error.strerror, where=str(path)) from None

    def read(self, digest: str) -> SignedJob | None:
        """Return the job of a digest; None where the disk has lost or changed it."""
        try:
            with open(self._path(digest), "rb", opener=private) as file:
                signed = SignedJob.from_bytes(file.read(MAX_JOB_BYTES + 1))
        except (OSError, FormatError, ConsentError):
            return None
        return signed if signed.job.digest == digest and not signed.missing() else None

    def remove(self, digest: str) -> None:
        """Remove the file if it is there; raises StorageError."""
        try:
            self._path(digest).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError("cannot remove a job", got=error.strerror, where=str(self._path(digest))) from None

    def remove_all_but(self, digests: set[str]) -> None:
        """Remove what a crash has left between the file and the commit."""
        for path in self._directory.glob("*.*"):
            if path.suffix == ".new" or path.stem not in digests:
                path.unlink(missing_ok=True)

    def _path(self, digest: str) -> Path:
        return self._directory / f"{digest}.job"
