"""The book of jobs: what was submitted, what is waiting for what, what came out. Kept in the sealed state.

    waiting  --all inputs there-->  queued  -->  running  -->  done
       |                                            |
       +--terms refuse-->  refused                  +-->  failed  --submitted again-->  queued

A job runs once: whoever submits it again after that is refused, as its digest stays in the book. What is entered here
is in the audit log too, the entry first, and both are committed before anything is done about it.
"""

import base64
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from obfuscatune.errors import ConsentError, ObfuscatuneError, UsageError
from obfuscatune.parties.job import SignedJob
from obfuscatune.sealed.header import read_header
from obfuscatune.service.consent import check_input, check_job
from obfuscatune.service.log import AuditLog
from obfuscatune.service.state import State
from obfuscatune.service.store import Store


@dataclass
class Record:
    """One job in the book. ``signed`` is its file in base64; ``order`` its place in the queue.

    Attributes:
        status: as in the drawing above. reason: why it was refused or failed: the class of the error, no message.
        step, steps: how far the training is, and where it ends. checkpoint: digest of the last one.
        results: digests of sealed results, by kind. queries: prompts answered so far.
    """

    signed: str
    order: int
    status: str = "waiting"
    reason: str = ""
    step: int = 0
    steps: int = 0
    checkpoint: str | None = None
    results: dict[str, str] = field(default_factory=dict)
    queries: int = 0


class Book:
    """The jobs of this enclave. Every method may be called from several threads.

    Args:
        state: where it is kept, under its lock. log: of all that happens. store: of the inputs and results.
    """

    def __init__(self, state: State, log: AuditLog, store: Store) -> None:
        self.state, self.log, self.store = state, log, store
        self.changed = threading.Condition(state.lock)
        self._records = {digest: Record(**fields) for digest, fields in state.jobs.items()}
        with state.lock:
            for digest, record in self._records.items():
                if record.status == "running":  # the enclave was killed: from the last checkpoint on
                    self._enter(digest, "resumed", status="queued")

    def submit(self, signed: SignedJob, party: str) -> str:
        """Take a job in, or find it; queue it if nothing is missing. Return its digest.

        Raises:
            ConsentError: see `consent`; or the job was run already.
        """
        digest = signed.job.digest
        with self.state.lock:
            try:
                check_job(signed, enclave=self.state.identity.public.fingerprint, now=time.time())
                record = self._records.get(digest)
                if record is not None and record.status in ("done", "refused"):
                    raise ConsentError("job is used up", got=record.status, hint="make a new one, and let both sign it")
            except ConsentError as error:
                self.note("refused", digest, party, reason=_reason(error))
                raise
            if record is None:
                order = 1 + max((r.order for r in self._records.values()), default=0)
                self._records[digest] = Record(base64.b64encode(signed.to_bytes()).decode(), order)
                self._enter(digest, "submitted", party=party)
            elif record.status == "failed":
                self._enter(digest, "submitted-again", party=party, status="queued", reason="")
            self.review()
        return digest

    def review(self) -> None:
        """Queue the waiting jobs whose inputs are all there, or refuse them by their owners' terms."""
        with self.state.lock:
            for digest, record in self._records.items():
                if record.status == "waiting" and not self.missing(digest):
                    self._decide(digest)
            self.changed.notify_all()

    def _decide(self, digest: str) -> None:
        signed = self.signed(digest)
        try:
            check_job(signed, enclave=self.state.identity.public.fingerprint, now=time.time())
            for kind, file in signed.job.inputs.items():
                header = read_header(self.store.path(file))
                check_input(signed, kind, header.digest, header.header, now=time.time())
        except ObfuscatuneError as error:
            # A refusal's text goes to the parties: it holds names of profiles and roles, and digests.
            reason = str(error)[:500] if isinstance(error, ConsentError) else _reason(error)
            self._enter(digest, "refused", status="refused", reason=reason, cause=_reason(error))
        else:
            self._enter(digest, "queued", status="queued", profile=signed.job.profile_name)

    def next(self) -> str | None:
        """Mark the first queued job as running and return its digest, if there is one."""
        with self.state.lock:
            queued = self._queued()
            if queued is None:
                return None
            if time.time() >= self.signed(queued).job.expires:
                self._enter(queued, "refused", status="refused", reason="job has expired", cause="ConsentError")
                return None
            self._enter(queued, "started", status="running")
            return queued

    def has_queued(self) -> bool:
        """Return whether a job is queued."""
        return self._queued() is not None

    def _queued(self) -> str | None:
        queued = [(record.order, digest) for digest, record in self._records.items() if record.status == "queued"]
        return min(queued)[1] if queued else None

    def progress(self, digest: str, step: int, steps: int) -> None:
        """Note how far a running job is; kept in memory until the next commit."""
        with self.state.lock:
            record = self._records[digest]
            record.step, record.steps = step, steps

    def checkpointed(self, digest: str, step: int, checkpoint: str) -> None:
        """Make a checkpoint the one to resume from, and drop the one before."""
        with self.state.lock:
            before = self._records[digest].checkpoint
            self._enter(digest, "checkpoint", checkpoint=checkpoint, step=step, file=checkpoint)
            if before is not None and before != checkpoint:
                self.store.remove(before)

    def finished(self, digest: str, results: dict[str, str]) -> None:
        """Enter the results; the checkpoint is dropped."""
        with self.state.lock:
            before = self._records[digest].checkpoint
            self._enter(digest, "done", status="done", results=results, checkpoint=None, **_words(results))
            if before is not None:
                self.store.remove(before)

    def failed(self, digest: str, error: BaseException) -> None:
        """Enter that a job failed; who submits it again resumes it.

        Of the error its class only: the text may name columns of one owner's data, or layers of the other's model.
        """
        with self.state.lock:
            self._enter(digest, "failed", status="failed", reason=_reason(error), cause=_reason(error))

    def count_queries(self, digest: str, party: str, prompts: int) -> None:
        """Count prompts of a query before they are answered, so that no crash gives any away for nothing.

        Raises:
            ConsentError: more than the job allows.
        """
        with self.state.lock:
            record, allowed = self._records[digest], self.signed(digest).job.max_queries
            if record.queries + prompts > allowed:
                got, expected = f"{record.queries} before and {prompts} now", f"at most {allowed}"
                raise ConsentError("queries of the job are used up", got=got, expected=expected)
            self._enter(digest, "query", party=party, queries=record.queries + prompts, prompts=prompts)

    def note(self, event: str, job: str | None = None, party: str | None = None, **details: str | int) -> None:
        """Write an entry into the log and commit it."""
        with self.state.lock:
            self.log.append(event, job=job, party=party, **details)
            self.commit()

    def commit(self) -> None:
        """Seal the book and the log's head."""
        with self.state.lock:
            self.state.jobs = {digest: asdict(record) for digest, record in self._records.items()}
            self.state.log_head, self.state.log_length = self.log.head, self.log.length
            self.state.commit()

    def record(self, digest: str) -> Record:
        """Return the record of a job; raises UsageError where there is none."""
        if digest not in self._records:
            raise UsageError("no such job", hint="submit it first")
        return self._records[digest]

    def signed(self, digest: str) -> SignedJob:
        """Return the job with its signatures."""
        return SignedJob.from_bytes(base64.b64decode(self.record(digest).signed))

    def missing(self, digest: str) -> dict[str, str]:
        """Return the inputs that are not there yet, digest by kind."""
        return {kind: file for kind, file in self.signed(digest).job.inputs.items() if not self.store.has(file)}

    def jobs_of(self, party: str) -> list[str]:
        """Return the jobs in which an identity has a role, oldest first."""
        with self.state.lock:
            mine = [(r.order, d) for d, r in self._records.items() if self.signed(d).job.role_of(party) is not None]
        return [digest for _, digest in sorted(mine)]

    def _enter(self, digest: str, event: str, *, party: str | None = None, **changes: Any) -> None:
        """Change a record, log it, commit; what is no field of the record is a detail of the log only."""
        record = self._records[digest]
        fields = {name: value for name, value in changes.items() if name in record.__dataclass_fields__}
        for name, value in fields.items():
            setattr(record, name, value)
        details = {
            name: value
            for name, value in changes.items()
            if type(value) in (str, int) and name not in ("status", "reason", "checkpoint", "queries")
        }
        self.log.append(event, job=digest, party=party, **details)
        self.commit()
        self.changed.notify_all()


def _words(results: dict[str, str]) -> dict[str, str]:
    return {f"{kind}-file": digest for kind, digest in results.items()}


def _reason(error: BaseException) -> str:
    return type(error).__name__
