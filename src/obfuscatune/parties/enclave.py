"""An enclave as a party meets it: judged by the party's policy at every connection, then asked for one thing.

What it is asked for is a job's life: submit with inputs, status, watch, fetch, query, cancel, delete.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from obfuscatune.durable import rename
from obfuscatune.errors import (
    AttestationError,
    BusyError,
    ConsentError,
    ObfuscatuneError,
    ProtocolError,
    SealError,
    StorageError,
    UsageError,
    printable,
)
from obfuscatune.parties.channel.address import TlsAddress
from obfuscatune.parties.channel.client import AttestedChannel
from obfuscatune.parties.channel.transfer import download, upload
from obfuscatune.parties.job import Job, SignedJob
from obfuscatune.parties.reached import Reached, line_of
from obfuscatune.parties.sealed.archive import SealedArchive
from obfuscatune.parties.sealed.extract import extract, holds
from obfuscatune.parties.sealed.header import read_header
from obfuscatune.parties.sealed.reader import SealedReader

RESULTS = ("adapter", "output", "report")
ENDED = ("done", "failed", "refused", "cancelled", "deleted")
MAX_RESULT_BYTES = 1 << 40
_ELSEWHERE = "nothing is ever overwritten: take another --output_dir"
_LEAST_SECONDS = 5.0  # that an enclave has to answer, however little patience there is
Progress = Callable[[str, int, int], None]  # file, bytes done, bytes in all (0: not known yet)


@dataclass(frozen=True)
class Status:
    """What a party may know of a job: progress, no content; all text of it comes from the enclave.

    Attributes:
        job: digest. status: ``waiting``, ``queued``, ``running``, ``done``, ``failed``, ``refused``, ``cancelled`` or
            ``deleted``. reason: of the last but two. step, steps: of the training. missing: digests by kind.
        results: digests of the party's results by kind. workers: which worker has got what of the model.
        resumes_from: the step from which a job goes on that has failed, or was submitted again; 0 for its beginning.
        answering: seconds that it has stood still for queries of other jobs, see `TURNS`.
    """

    job: str
    status: str
    reason: str = ""
    step: int = 0
    steps: int = 0
    missing: Mapping[str, str] = field(default_factory=dict)
    results: Mapping[str, str] = field(default_factory=dict)
    workers: tuple[Mapping[str, Any], ...] = ()
    resumes_from: int = 0
    answering: int = 0

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Status":
        """Return the status of a reply; raises ProtocolError where it is none."""
        kinds = {"job": str, "status": str, "reason": str, "step": int, "steps": int, "missing": dict, "results": dict}
        workers = fields.get("workers", [])
        if not all(type(fields.get(name)) is kind for name, kind in kinds.items()) or type(workers) is not list:
            raise ProtocolError("enclave's reply is no status of a job")
        step, answering = fields.get("resumes_from", 0), fields.get("answering", 0)
        return cls(
            **{name: fields[name] for name in kinds},
            workers=tuple(w for w in workers if type(w) is dict),
            resumes_from=step if type(step) is int else 0,
            answering=answering if type(answering) is int else 0,
        )

    @property
    def has_ended(self) -> bool:
        """Whether nothing more happens without a party."""
        return self.status in ENDED

    def __str__(self) -> str:
        parts = [f"job {printable(self.job)[:16]}", printable(self.status)]
        parts += [f"step {self.step} of {self.steps}"] if self.steps else []
        parts += [f"{self.answering} s for queries of other jobs"] if self.answering else []
        parts += [f"waits for: {', '.join(map(printable, self.missing))}"] if self.missing else []
        parts += [printable(self.reason)] if self.reason else []
        if self.status in ("waiting", "queued") and self.resumes_from:
            parts.append(f"goes on from step {self.resumes_from}")
        if self.status == "failed":
            start = f"from step {self.resumes_from}" if self.resumes_from else "from its beginning"
            parts.append(f"\nhint: obfuscatune job submit, once more, goes on {start}")
        return "  ".join(parts)


class LostError(ObfuscatuneError):
    """The enclave did not answer for too long; what became of the job is not known."""


@dataclass(frozen=True)
class Enclave(Reached):
    """The enclave at an address, for one party, and the life of its jobs there; arguments as of `Reached`."""

    def submit(self, signed: SignedJob, inputs: Iterable[Path] = (), progress: Progress | None = None) -> Status:
        """Give it a job, and this party's sealed inputs; the job starts once those of both are there.

        Raises:
            UsageError: a file that is no input of the job. ConsentError: the enclave refuses the job.
        """
        files = {read_header(path).digest: path for path in inputs}
        unknown = sorted(str(path) for digest, path in files.items() if digest not in signed.job.inputs.values())
        if unknown:
            raise UsageError("file is no input of this job", got=", ".join(unknown), hint="obfuscatune job review")
        with self.connect(signed.job.enclave) as channel:
            reply, _ = channel.request({"op": "submit"}, signed.to_bytes())
            missing = Status.from_dict(reply).missing.values()  # else it came with an earlier job, and this one may run
            for digest in files.keys() & missing:
                _upload(channel, {"job": signed.job.digest, "file": digest}, files[digest], progress)
            status = _ask(channel, "status", signed)
        if status.status == "refused":
            raise ConsentError("the enclave refuses the job", got=printable(status.reason))
        return status

    def status(self, signed: SignedJob) -> Status:
        """Return how far a job is."""
        with self.connect(signed.job.enclave) as channel:
            return _ask(channel, "status", signed)

    def watch(self, signed: SignedJob, *, interval: float = 1.0, patience: float = 300.0) -> Iterator[Status]:
        """Yield the status again and again until the job has ended; connects anew where the connection is lost.

        Raises:
            LostError: it could not be reached for ``patience`` seconds. AttestationError, ConsentError: at once.
        """
        TlsAddress.parse(self.address)  # what is wrong with it is no loss
        # One that has stopped keeps its connections open: no answer may take much longer than the patience.
        near = replace(self, timeout=min(self.timeout, max(patience, _LEAST_SECONDS)))
        answered = time.monotonic()
        while True:
            try:
                with near.connect(signed.job.enclave) as channel:
                    while True:
                        status = _ask(channel, "status", signed)
                        answered = time.monotonic()
                        yield status
                        if status.has_ended:
                            return
                        time.sleep(interval)
            except (AttestationError, ConsentError):
                raise
            except (BusyError, StorageError, ProtocolError, UsageError, OSError) as error:
                if isinstance(error, UsageError) and error.what != "no enclave answers":
                    raise
                if time.monotonic() - answered > patience:
                    got = error.what if isinstance(error, ObfuscatuneError) else type(error).__name__
                    hint = "the job may still run: obfuscatune job watch, once the enclave answers"
                    raise LostError("the connection is lost", got=got, where=self.address, hint=hint) from None
                time.sleep(min(interval, max(0.0, patience)))

    def fetch(
        self, signed: SignedJob, directory: Path, *, keep_sealed: bool = False, progress: Progress | None = None
    ) -> list[Path]:
        """Fetch the results that the job gives to this party and open them; return where they are.

        Raises:
            UsageError: the job is not done, gives this party nothing, or what is there already is not of this job.
            SealError: not what the enclave has sealed.
        """
        with self.connect(signed.job.enclave) as channel:
            status = _ask(channel, "status", signed)
            if status.status != "done":
                over = status.has_ended and status.status != "failed"
                hint = "it gives nothing any more: obfuscatune job propose" if over else "obfuscatune job watch"
                raise UsageError("the job is not done", got=str(status), hint=hint)
            results = {kind: digest for kind, digest in status.results.items() if kind in RESULTS}
            if not results:
                raise UsageError("the job gives you no results", hint="obfuscatune job review")
            # A successor's: they were sealed to the identity that the job names, whose key need not be here any more.
            if not keep_sealed and signed.job.role_of(self.identity.public.fingerprint) is None:
                got = f"{self.identity.public.name} {self.identity.public.fingerprint[:16]}, which succeeds it"
                hint = "obfuscatune job fetch --keep_sealed, then sealed open FILE --identity OLD.key --output_dir DIR"
                raise UsageError("the results are sealed to the identity that the job names", got=got, hint=hint)
            # Others came before an interruption, or with an earlier call.
            lacking = [kind for kind, digest in results.items() if not _came(directory / f"{kind}.sealed", digest)]
            check_free(directory, lacking)
            for kind in lacking:
                _download(channel, signed.job.digest, kind, directory / f"{kind}.sealed", progress)
            enclaves = line_of(channel, signed.job.enclave)
        found = []
        for kind, digest in results.items():
            path = directory / f"{kind}.sealed"
            if not keep_sealed:
                with SealedReader(path, self.identity) as reader:
                    if (
                        reader.digest != digest
                        or reader.header.kind != kind
                        or reader.sender.fingerprint not in enclaves
                    ):
                        raise SealError("not the result that the enclave has sealed", where=str(path))
                    archive = SealedArchive(reader)
                    if not os.path.lexists(directory / kind):
                        extract(archive, directory / kind)
                    elif not holds(directory / kind, archive):  # whoever put it there: it is not this job's
                        got, hint = "other files than this job's result", _ELSEWHERE
                        raise UsageError("a result is there already", got=got, where=str(directory / kind), hint=hint)
            found.append(path if keep_sealed else directory / kind)
        return found

    def cancel(self, signed: SignedJob) -> Status:
        """End a job that is not done, for good."""
        with self.connect(signed.job.enclave) as channel:
            return _ask(channel, "cancel", signed)

    def delete(self, signed: SignedJob) -> Status:
        """Remove all that the enclave keeps of a job that has ended: results, inputs, the trained model."""
        with self.connect(signed.job.enclave) as channel:
            return _ask(channel, "delete", signed)

    def jobs(self) -> list[Status]:
        """Return this party's jobs, oldest first."""
        with self.connect() as channel:
            _, payload = channel.request({"op": "list"})
        try:
            rows = json.loads(payload)
        except ValueError:
            rows = None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ProtocolError("enclave's reply is no list of jobs")
        return [Status.from_dict(row) for row in rows]


def results_of(job: Job, fingerprint: str) -> list[str]:
    """Return which kinds of results a job gives to a party."""
    given = {"adapter": job.adapter_to, "output": job.generations_to, "report": ("owner",)}
    return [kind for kind in RESULTS if job.role_of(fingerprint) in given[kind]]


def check_free(directory: Path, kinds: Iterable[str]) -> None:
    """Refuse a directory with results of these kinds: they are of another job, or nobody could tell.

    Raises:
        UsageError: naming what is there.
    """
    for kind in sorted(kinds):
        for path in (directory / f"{kind}.sealed", directory / kind):
            if os.path.lexists(path):
                raise UsageError("a result is there already", where=str(path), hint=_ELSEWHERE)


def _came(path: Path, digest: str) -> bool:
    """Return whether a sealed result is there."""
    return path.exists() and read_header(path).digest == digest


def _ask(channel: AttestedChannel, operation: str, signed: SignedJob) -> Status:
    fields, _ = channel.request({"op": operation, "job": signed.job.digest})
    return Status.from_dict(fields)


def _upload(channel: AttestedChannel, fields: dict[str, str], path: Path, progress: Progress | None) -> None:
    size = path.stat().st_size
    reply, _ = channel.request({**fields, "op": "resume_upload", "size": size})
    done = offset = int(reply["offset"])

    def sent(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(path.name, done, size)

    with path.open("rb") as source:
        if offset < size:
            upload(channel, {**fields, "op": "upload"}, source, size, start=offset, progress=sent)


def _download(channel: AttestedChannel, job: str, kind: str, path: Path, progress: Progress | None) -> None:
    beside, done = path.with_name(f".{path.name}.part"), 0

    def got(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(path.name, done, 0)

    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with beside.open("wb") as target:
            fields = {"op": "download", "job": job, "kind": kind}
            download(channel, fields, target, max_bytes=MAX_RESULT_BYTES, progress=got)
            target.flush()
            os.fsync(target.fileno())  # the enclave's own may be deleted next
        rename(beside, path)
    except OSError as error:
        raise ObfuscatuneError("cannot write the result", got=error.strerror, where=str(path)) from None
    finally:
        with contextlib.suppress(OSError):  # of a place that is below a file, for one
            beside.unlink(missing_ok=True)
