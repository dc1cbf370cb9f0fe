"""What the book of jobs is written in: records and signed jobs by digest, the log, and the seal under both.

What is entered is in the audit log too, the entry first, and both are committed before anything is done about it.
Where the disk refuses either, the ledger stays as it was.
"""

import logging
import threading
from collections.abc import Callable, Iterable

from obfuscatune.errors import ConsentError, StorageError, UsageError
from obfuscatune.parties.job import Job, SignedJob
from obfuscatune.service.consent import OWNERS
from obfuscatune.service.log import AuditLog
from obfuscatune.service.records import JobFiles, Record, recipients
from obfuscatune.service.state import State
from obfuscatune.service.store import Store

logger = logging.getLogger(__name__)


class Ledger:
    """The records of an enclave's jobs. Every public method may be called from several threads.

    Args:
        state: where it is kept, under its lock. log: of all that happens. store: of the inputs and results.
        left: gives the fingerprints of parties that have left, under whatever identity.
        names: gives of a party its fingerprint, and those of identities that it has succeeded: their jobs are its own.

    Attributes:
        records: the jobs by digest. jobs: those whose files have not made room for others', by digest.
        changed: notified whenever a record changes. committed: called after each commit, and before anything is done.
    """

    def __init__(
        self,
        state: State,
        log: AuditLog,
        store: Store,
        left: Callable[[], frozenset[str]],
        names: Callable[[str], frozenset[str]],
    ) -> None:
        self.state, self.log, self.store, self.left, self.names = state, log, store, left, names
        self.committed: Callable[[], None] = lambda: None
        self.changed = threading.Condition(state.lock)
        self.files = JobFiles(store.directory / "jobs")
        self.records = {digest: Record.from_fields(fields) for digest, fields in state.jobs.items()}
        kept = {digest for digest, record in self.records.items() if not record.retired}
        self.jobs = {digest: signed for digest in kept if (signed := self.files.read(digest)) is not None}
        self._committed = log.length

    def require_here(self) -> None:
        """Raise ConsentError if this enclave has handed its state over."""
        if self.state.handed:
            hint = "the new enclave goes on with it"
            raise ConsentError("the enclave was handed over", got=f"to {self.state.handed['to'][:16]}", hint=hint)

    def note(self, event: str, job: str | None = None, party: str | None = None, **details: str | int) -> None:
        """Write an entry into the log and commit it."""
        with self.state.lock:
            self.require_here()
            self.log.append(event, job=job, party=party, **details)
            self.commit()

    def commit(self) -> None:
        """Seal the records and the log's head; raises ConsentError once handed over, and as `State.commit`."""
        with self.state.lock:
            self.require_here()
            self._seal()

    def _seal(self) -> None:
        self.state.log_head, self.state.log_length = self.log.head, self.log.length
        self.state.commit()
        self.committed()
        self._committed = self.log.length

    def committed_log(self, start: int) -> tuple[dict[str, object], bytes]:
        """Return the log's signed head, which covers nothing uncommitted, and lines as `AuditLog.lines` does."""
        with self.state.lock:
            if self._committed != self.log.length:  # a commit failed
                self.commit()
            return self.log.signed_head(self.state.identity), self.log.lines(start)

    def hand_over(self, to: str, statement: str) -> None:
        """Enter to whom the state goes and under which statement: the last entry of this enclave.

        Raises:
            ConsentError: it was handed over to another, or under another statement. StorageError: it is as it was.
        """
        with self.state.lock:
            handed = {"statement": statement, "to": to}
            if self.state.handed:
                if self.state.handed != handed:
                    got = self.state.handed["to"][:16]
                    raise ConsentError("the enclave was handed over already", got=f"to {got}", expected=to[:16])
                return
            self.log.append("handed-over", **handed)
            self.state.handed = handed
            try:
                self._seal()
            except BaseException:
                self.state.handed = {}
                raise
            self.changed.notify_all()

    def record(self, digest: str) -> Record:
        """Return the record of a job as it is now; raises UsageError where there is none."""
        with self.state.lock:
            if digest not in self.records:
                raise UsageError("no such job", hint="submit it first")
            return self.records[digest]

    def signed(self, digest: str) -> SignedJob:
        """Return the job with its signatures; raises as :meth:`record`."""
        self.record(digest)
        signed = self.jobs.get(digest)
        if signed is None:
            raise UsageError("the job is over and its files have made room for others'")
        return signed

    def job_of(self, digest: object, party: str) -> tuple[str, Record]:
        """Return digest and record of a job in which an identity has a role.

        Raises:
            UsageError: there is none, with one answer for a job that is not there and for one of others.
        """
        with self.state.lock:
            record = self.records.get(digest) if isinstance(digest, str) else None
            if record is None or self.names(party).isdisjoint(record.parties):
                raise UsageError("no such job of this party", hint="obfuscatune job submit")
            return str(digest), record

    def name_in(self, job: Job, party: str) -> str:
        """Return the fingerprint by which a party is in a job: its own, or that of an identity it has succeeded."""
        return next((name for name in self.names(party) if job.role_of(name) is not None), party)

    def jobs_of(self, party: str) -> list[str]:
        """Return the jobs in which an identity has a role, oldest first: no more than its share of the book holds."""
        with self.state.lock:
            records, names = self.records.items(), self.names(party)
            found = [(record.order, digest) for digest, record in records if not names.isdisjoint(record.parties)]
        return [digest for _, digest in sorted(found)]

    def missing(self, digest: str) -> dict[str, str]:
        """Return the inputs that are not there yet, digest by kind."""
        return {kind: file for kind, file in self.signed(digest).job.inputs.items() if not self.store.has(file)}

    def results_for(self, digest: str, party: str) -> dict[str, str]:
        """Return the digests of the results that a job gives to a party, by kind."""
        with self.state.lock:
            record, signed = self.record(digest), self.jobs.get(digest)
            role = None if signed is None else signed.job.role_of(self.name_in(signed.job, party))
            return {kind: file for kind, file in record.results.items() if signed and role in recipients(signed, kind)}

    def operators_of(self, digest: str) -> dict[str, str]:
        """Return the operators of a job's workers by fingerprint; none of a job whose files have made room."""
        with self.state.lock:
            signed = self.jobs.get(digest)
            return {} if signed is None else {each.fingerprint: each.operator for each in signed.job.workers}

    def needed(self) -> set[str]:
        """Return the digests of all files that some job needs."""
        named = {file for record in self.records.values() for file in (*record.results.values(), record.checkpoint)}
        left = self.left()
        for digest, signed in self.jobs.items():
            if self.records[digest].status == "running":
                named |= set(signed.job.inputs.values())
            elif self.records[digest].status != "deleted":
                inputs = signed.job.inputs.items()
                named |= {file for kind, file in inputs if getattr(signed.job, OWNERS[kind]) not in left}
        return {file for file in named if file is not None}

    def drop(self, files: Iterable[str | None]) -> None:
        """Remove those files that no job needs any more. Where the disk refuses, the next start removes them."""
        for file in {file for file in files if file is not None} - self.needed():
            try:
                self.store.remove(file)
            except StorageError as error:
                logger.warning("%s", error)

    def enter(self, digest: str, record: Record, event: str, *, party: str | None = None, **details: str | int) -> None:
        """Log a change, make it, commit both. Under the lock, as `put`."""
        self.require_here()
        before = self.records.get(digest)
        self.log.append(event, job=digest, party=party, **details)
        self.put(digest, record)
        try:
            self.commit()
        except BaseException:  # what is not committed is not acted upon
            self.put(digest, before)
            raise
        self.changed.notify_all()

    def put(self, digest: str, record: Record | None) -> None:
        """Put a record where the next commit seals it; None takes it out."""
        if record is None:
            del self.records[digest]
            self.state.jobs.pop(digest, None)
        else:
            self.records[digest], self.state.jobs[digest] = record, record.to_fields()
