"""The book of jobs: what was submitted, what is waiting for what, what came out. Kept in the sealed state.

    waiting  --all inputs there-->  queued  -->  running  -->  done
       |                              |             |
       +--------consent lacks---------+             +-->  failed  --submitted again-->  waiting
                      |
                   refused

    waiting, queued, running  --a party cancels-->  cancelled
    waiting, done, failed, refused, cancelled  --a party deletes-->  deleted: no sealed file of it is left here

A job runs once: whoever submits it again after that is refused, as its digest stays in the book. What is entered here
is in the audit log too, the entry first, and both are committed before anything is done about it. Where the disk
refuses either, the book stays as it was.
"""

import base64
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from obfuscatune.errors import ConsentError, ObfuscatuneError, UsageError
from obfuscatune.parties.job import Job, SignedJob
from obfuscatune.parties.sealed.header import read_header
from obfuscatune.service.consent import check_input, check_job, check_query
from obfuscatune.service.log import AuditLog
from obfuscatune.service.record import ENDED, Record
from obfuscatune.service.state import State
from obfuscatune.service.store import Store

MAX_STARTS = 5  # without a checkpoint in between: a job that brings the enclave down must not do so for ever
# Both halves of a job's parties may be one party's invention, so one may not fill the state, which ends everything.
MAX_BYTES, MAX_PARTY_BYTES = 8 << 20, 2 << 20
_RECORD_BYTES = 4096  # of a record, beside its job
_MAX_NOTED = 10_000  # refusals that the log tells of, in one life of the enclave: it must not be flooded
_MAX_STEPS = 1 << 53
_MAX_WORD = 80  # of the log


class Book:
    """The jobs of this enclave. Every method may be called from several threads.

    Args:
        state: where it is kept, under its lock. log: of all that happens. store: of the inputs and results.
        ended: gives the fingerprints of identities that their owners have ended; asked whenever consent is checked.
    """

    def __init__(
        self, state: State, log: AuditLog, store: Store, *, ended: Callable[[], frozenset[str]] = frozenset
    ) -> None:
        self._ended = ended
        self.state, self.log, self.store = state, log, store
        self.changed = threading.Condition(state.lock)
        self._records = {digest: Record(**fields) for digest, fields in state.jobs.items()}
        self._signed = {d: SignedJob.from_bytes(base64.b64decode(r.signed)) for d, r in self._records.items()}
        self._noted: set[tuple[str, str]] = set()
        self._committed = log.length
        with state.lock:
            for digest, record in self._records.items():
                if record.status == "running" and record.cancelled:
                    self._end(digest, replace(record, status="cancelled"))
                elif record.status == "running" and record.starts < MAX_STARTS:  # killed: from the last checkpoint on
                    self._enter(digest, replace(record, status="queued"), "resumed")
                elif record.status == "running":
                    stopped = replace(record, status="failed", reason="Interrupted")
                    self._enter(digest, stopped, "failed", cause=stopped.reason)
            self._sweep()
            self.review()  # the crash may have come between an upload and its entry

    def _sweep(self) -> None:
        """Remove what no job names: a checkpoint or a result that a crash kept from the book would stay for ever."""
        named: set[str | None] = set()
        for digest, record in self._records.items():
            if record.status != "deleted":
                named |= {record.checkpoint, *record.results.values(), *self._signed[digest].job.inputs.values()}
        for digest in self.store.digests():
            if digest not in named:
                self.store.remove(digest)

    def submit(self, signed: SignedJob, party: str) -> str:
        """Take a job in, or find it; queue it if nothing is missing. Return its digest.

        Raises:
            ConsentError: see `consent`; or the job was run already. UsageError: the book is full.
        """
        digest = signed.job.digest
        with self.state.lock:
            record = self._records.get(digest)
            try:
                fingerprint = self.state.identity.public.fingerprint
                check_job(signed, enclave=fingerprint, now=time.time(), ended=self._ended())
                if record is not None and record.status in ENDED:
                    raise ConsentError("job is used up", got=record.status, hint="make a new one, and let both sign it")
            except ConsentError as error:
                if (digest, party) not in self._noted and len(self._noted) < _MAX_NOTED:
                    self._noted.add((digest, party))
                    self.note("refused", digest, party, reason=_reason(error))
                raise
            last = 1 + max((r.order for r in self._records.values()), default=0)
            if record is None:
                record = Record(base64.b64encode(signed.to_bytes()).decode(), last)
                self._require_room(record, party)
                self._signed[digest] = signed
                self._enter(digest, record, "submitted", party=party)
            elif record.status == "failed":  # to the end of the queue: one that always fails must not hold up others
                again = replace(record, status="waiting", reason="", order=last, starts=0)
                self._enter(digest, again, "submitted-again", party=party)
            self.review()
        return digest

    def _require_room(self, new: Record, party: str) -> None:
        sizes = {digest: len(r.signed) + _RECORD_BYTES for digest, r in self._records.items()}
        mine = sum(size for digest, size in sizes.items() if self._signed[digest].job.role_of(party) is not None)
        size = len(new.signed) + _RECORD_BYTES
        if mine + size > MAX_PARTY_BYTES or sum(sizes.values()) + size > MAX_BYTES:
            raise UsageError("no room for another job", hint="the operator starts an enclave on a new directory")

    def review(self) -> None:
        """Queue the waiting jobs whose inputs are all there, or refuse them by their owners' terms."""
        with self.state.lock:
            for digest, record in self._records.items():
                if record.status != "waiting" or self.missing(digest):
                    continue
                try:
                    self._check(digest)
                except ObfuscatuneError as error:
                    self._refuse(digest, error)
                else:
                    profile = _word(self._signed[digest].job.profile_name)
                    self._enter(digest, replace(record, status="queued"), "queued", profile=profile)
            self.changed.notify_all()

    def _check(self, digest: str) -> None:
        """Check a job and its inputs against what both owners have agreed to, as of now."""
        signed, now = self._signed[digest], time.time()
        check_job(signed, enclave=self.state.identity.public.fingerprint, now=now, ended=self._ended())
        for kind, file in signed.job.inputs.items():
            found = read_header(self.store.path(file))
            check_input(signed, kind, found.digest, found.header, now=now)

    def _refuse(self, digest: str, error: ObfuscatuneError) -> None:
        # A refusal's text goes to the parties: it holds names of profiles and roles, and digests.
        reason = str(error)[:500] if isinstance(error, ConsentError) else _reason(error)
        self._end(digest, replace(self._records[digest], status="refused", reason=reason), cause=_reason(error))

    def next(self) -> str | None:
        """Mark the first queued job as running and return its digest, if there is one.

        It may have been queued for long: whether both owners still agree is checked again.
        """
        with self.state.lock:
            queued = [(record.order, digest) for digest, record in self._records.items() if record.status == "queued"]
            if not queued:
                return None
            _, digest = min(queued)
            try:
                self._check(digest)
            except ConsentError as error:
                self._refuse(digest, error)
                return None
            except ObfuscatuneError as error:  # the disk lost an input, or changed it
                self.failed(digest, error)
                return None
            record = self._records[digest]
            started = replace(record, status="running", starts=record.starts + 1)
            self._enter(digest, started, "started", starts=started.starts)
            return digest

    def has_queued(self) -> bool:
        """Return whether a job is queued."""
        with self.state.lock:
            return any(record.status == "queued" for record in self._records.values())

    def placed(self, digest: str, workers: list[dict[str, Any]]) -> None:
        """Enter which worker has got what of the model; an entry of the log for each."""
        with self.state.lock:
            kept = [{name: part[name] for name in ("worker", "blocks", "parameters", "form")} for part in workers]
            self._records[digest] = replace(self._records[digest], workers=kept)  # the job has the operators' names
            for part in kept:
                self.log.append("placed", job=digest, **{**part, "worker": part["worker"] or "unnamed"})
            self.commit()

    def cancel(self, digest: str, party: str) -> None:
        """End a job that is not done, for good: at once where it waits, at its next step where it runs.

        Raises:
            UsageError: it has ended.
        """
        with self.state.lock:
            record = self.record(digest)
            if record.status in ENDED or record.status == "failed":
                raise UsageError("the job has ended", got=record.status, hint="obfuscatune job delete")
            if record.cancelled:
                return
            self.note("cancel", digest, party)
            if record.status == "running":
                self._records[digest] = replace(record, cancelled=True)
                self.commit()
            else:
                self._end(digest, replace(record, status="cancelled"))

    def is_cancelled(self, digest: str) -> bool:
        """Return whether a party has asked for the end of a running job."""
        return self.record(digest).cancelled

    def delete(self, digest: str, party: str) -> None:
        """Remove what is kept of a job: results, checkpoint, and the inputs that no other job needs.

        Raises:
            UsageError: it is queued or runs.
        """
        with self.state.lock:
            record = self.record(digest)
            if record.status in ("queued", "running"):
                raise UsageError("the job has not ended", got=record.status, hint="obfuscatune job cancel")
            if record.status == "deleted":
                return
            needed = {
                file
                for other, kept in self._records.items()
                if other != digest and kept.status != "deleted"
                for file in (*self._signed[other].job.inputs.values(), *kept.results.values())
            }
            files = {*record.results.values(), *self._signed[digest].job.inputs.values()} - needed
            self._end(digest, replace(record, status="deleted", results={}), by=party)
            for file in files:
                self.store.remove(file)

    def progress(self, digest: str, step: int, steps: int) -> None:
        """Note how far a running job is; kept in memory until the next commit."""
        with self.state.lock:  # bounded: a number that the state cannot hold would stop all jobs
            step, steps = min(step, _MAX_STEPS), min(steps, _MAX_STEPS)
            self._records[digest] = replace(self._records[digest], step=step, steps=steps)

    def checkpointed(self, digest: str, step: int, checkpoint: str) -> None:
        """Make a checkpoint the one to resume from, and drop the one before."""
        with self.state.lock:
            before = self._records[digest]
            now = replace(before, checkpoint=checkpoint, step=step, starts=0)
            self._enter(digest, now, "checkpoint", step=step, file=checkpoint)
            if before.checkpoint not in (None, checkpoint):
                self.store.remove(str(before.checkpoint))

    def finished(self, digest: str, results: dict[str, str]) -> None:
        """Enter the results; the checkpoint is dropped."""
        with self.state.lock:
            files = {f"{kind}-file": file for kind, file in results.items()}
            self._end(digest, replace(self._records[digest], status="done", results=results), **files)

    def failed(self, digest: str, error: BaseException) -> None:
        """Enter that a job failed, or was cancelled; who submits one that failed again resumes it.

        Of the error its class only: the text may name columns of one owner's data, or layers of the other's model. Of
        a refusal what it is about, too, which is a sentence of the enclave's own.
        """
        with self.state.lock:
            if self._records[digest].cancelled:
                self._end(digest, replace(self._records[digest], status="cancelled"))
                return
            reason = error.what if isinstance(error, ConsentError) else _reason(error)
            record = replace(self._records[digest], status="failed", reason=reason)
            self._enter(digest, record, "failed", cause=_reason(error))

    def check_query(self, digest: str, party: str, prompts: int, tokens: int) -> None:
        """Check that a party may now ask for completions of ``prompts`` prompts, of up to ``tokens`` tokens each.

        Raises:
            UsageError: the job is not done. ConsentError: beyond the job, see `consent`.
        """
        record = self.record(digest)
        if record.status != "done":
            raise UsageError("the job is not done", got=record.status, hint="obfuscatune job watch")
        job = self._signed[digest].job
        check_query(job, party, prompts=prompts, before=record.queries, tokens=tokens, now=time.time())

    def count_query(self, digest: str, party: str, prompts: int, tokens: int) -> None:
        """Count prompts before they are answered, so that no crash gives any away; checks and raises as above."""
        with self.state.lock:
            self.check_query(digest, party, prompts, tokens)
            record = self._records[digest]
            counted = replace(record, queries=record.queries + prompts)
            self._enter(digest, counted, "query", party=party, prompts=prompts)

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
            self._committed = self.log.length

    def committed_log(self, start: int) -> tuple[dict[str, object], bytes]:
        """Return the log's signed head, which covers nothing uncommitted, and lines as `AuditLog.lines` does."""
        with self.state.lock:
            if self._committed != self.log.length:  # a commit failed
                self.commit()
            return self.log.signed_head(self.state.identity), self.log.lines(start)

    def record(self, digest: str) -> Record:
        """Return the record of a job as it is now; raises UsageError where there is none."""
        with self.state.lock:
            if digest not in self._records:
                raise UsageError("no such job", hint="submit it first")
            return self._records[digest]

    def signed(self, digest: str) -> SignedJob:
        """Return the job with its signatures; raises as :meth:`record`."""
        self.record(digest)
        return self._signed[digest]

    def job_of(self, digest: object, party: str) -> Job:
        """Return a job in which an identity has a role.

        Raises:
            UsageError: there is none, with one answer for a job that is not there and for one of others.
        """
        signed = self._signed.get(digest) if isinstance(digest, str) and digest in self._records else None
        if signed is None or signed.job.role_of(party) is None:
            raise UsageError("no such job of this party", hint="obfuscatune job submit")
        return signed.job

    def jobs_of(self, party: str) -> list[str]:
        """Return the jobs in which an identity has a role, oldest first: no more than `MAX_PARTY_BYTES` holds."""
        with self.state.lock:
            found = [(r.order, d) for d, r in self._records.items() if self._signed[d].job.role_of(party) is not None]
        return [digest for _, digest in sorted(found)]

    def missing(self, digest: str) -> dict[str, str]:
        """Return the inputs that are not there yet, digest by kind."""
        return {kind: file for kind, file in self.signed(digest).job.inputs.items() if not self.store.has(file)}

    def _end(self, digest: str, record: Record, **details: str) -> None:
        """Enter the end of a job, by its status; nothing resumes it, so the checkpoint goes."""
        self._enter(digest, replace(record, checkpoint=None), record.status, **details)
        if record.checkpoint is not None:
            self.store.remove(record.checkpoint)

    def _enter(
        self, digest: str, record: Record, event: str, *, party: str | None = None, **details: str | int
    ) -> None:
        """Log a change, make it, commit both."""
        before = self._records.get(digest)
        self.log.append(event, job=digest, party=party, **details)
        self._records[digest] = record
        try:
            self.commit()
        except BaseException:  # what is not committed is not acted upon
            if before is None:
                del self._records[digest]
            else:
                self._records[digest] = before
            raise
        self.changed.notify_all()


def _word(name: str) -> str:
    """A profile's name for the log, which the job's digest tells in full."""
    return name if len(name) <= _MAX_WORD else f"{name[: _MAX_WORD - 3]}..."


def _reason(error: BaseException) -> str:
    return type(error).__name__
