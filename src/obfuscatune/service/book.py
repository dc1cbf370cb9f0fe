"""The book of jobs: what was submitted, what is waiting for what, what came out. Kept in the sealed state.

    waiting  --all inputs there-->  queued  -->  running  -->  done
       |                              |             |
       |                              |             +-->  failed  --submitted again-->  waiting
       |                              |             |
       +--------------consent lacks---+-------------+-->  refused

    waiting, queued, running  --a party cancels-->  cancelled
    waiting, done, failed, refused, cancelled  --a party deletes-->  deleted: no sealed file of it is left here

A job runs once: whoever submits it again after that is refused, as its digest stays in the book until it has expired.
Here is the life of a job. What the book is written in is the `ledger`; parties share its `room`; questions to a job's
results are counted in `questions`.
"""

import time
from collections import Counter
from collections.abc import Callable, Container
from dataclasses import replace
from typing import Any

from obfuscatune.errors import ConsentError, ObfuscatuneError, UsageError
from obfuscatune.parties.job import SignedJob
from obfuscatune.parties.sealed.header import read_header
from obfuscatune.service.consent import OWNERS, LackingError, check_input, check_job
from obfuscatune.service.ledger import Ledger
from obfuscatune.service.log import AuditLog
from obfuscatune.service.questions import Questions
from obfuscatune.service.records import ENDED, USED_UP, WORKERS, Record, bytes_of
from obfuscatune.service.room import Room
from obfuscatune.service.shares import Parties
from obfuscatune.service.state import State
from obfuscatune.service.store import Store
from obfuscatune.service.uses import Input, Uses

MAX_STARTS = 5  # without a checkpoint in between: a job that brings the enclave down must not do so for ever
# In one life of the enclave, since the log must not be flooded: refusals of a party that it tells of, and times that a
# failed job is taken in again.
_MAX_NOTED = 1000
_MAX_STEPS = 1 << 53
_MAX_WORD = 80  # of the log
PAUSED = "paused until the disk has room"


class Book(Ledger):
    """The jobs of this enclave. Every method may be called from several threads.

    Args:
        state: where it is kept, under its lock. log: of all that happens. store: of the inputs and results.
        parties: who shares it. ended: gives the fingerprints of whom no job may be; asked whenever consent is
            checked. left: of parties that have left, under whatever identity. names: as of `Ledger`.
    """

    def __init__(
        self,
        state: State,
        log: AuditLog,
        store: Store,
        parties: Parties = tuple,
        *,
        ended: Callable[[], Container[str]] = frozenset,
        left: Callable[[], frozenset[str]] = frozenset,
        names: Callable[[str], frozenset[str]] = lambda party: frozenset({party}),
    ) -> None:
        super().__init__(state, log, store, left, names)
        self.uses = Uses(state)
        self.room, self.questions = Room(self, self.uses, parties), Questions(self)
        self._ended, self._enclaves = ended, state.fingerprints
        self._noted: set[tuple[str, str]] = set()
        self._noted_of: Counter[str] = Counter()
        self._again: Counter[str] = Counter()
        with state.lock:
            if state.handed:  # nothing of it is ours to change
                return
            kept = {digest for digest, record in self.records.items() if not record.retired}
            self.files.remove_all_but(kept)
            store.remove_unnamed(self.needed())
            for digest in self.jobs:
                self.room.charge(digest)
            for digest in kept - set(self.jobs):
                self._lost(digest)
            for digest, record in list(self.records.items()):
                if record.status == "running" and record.cancelled:
                    self._end(digest, replace(record, status="cancelled"))
                elif record.status == "running" and record.starts < MAX_STARTS:  # killed: from the last checkpoint on
                    self.enter(digest, replace(record, status="queued", reason=""), "resumed")
                elif record.status == "running":
                    stopped = replace(record, status="failed", reason="Interrupted", ended=int(time.time()))
                    self.enter(digest, stopped, "failed", cause=stopped.reason)
            self.end_jobs_of_who_left()  # the crash may have come between a removal and this
            self.review()  # or between an upload and its entry

    def submit(self, signed: SignedJob, party: str) -> str:
        """Take a job in, or find it; queue it if nothing is missing. Return its digest.

        Raises:
            ConsentError: see `consent`; or the job was run already. UsageError: the book is full.
        """
        digest = signed.job.digest
        with self.state.lock:
            record = self.records.get(digest)
            try:
                self.check(signed)
                if record is None and signed.job.expires <= self.state.forgotten:  # it may have been run
                    raise ConsentError("job has expired", hint="make a new one, and let both sign it")
                if record is not None and record.status in USED_UP:
                    raise ConsentError("job is used up", got=record.status, hint="make a new one, and let both sign it")
            except ConsentError as error:
                if (digest, party) not in self._noted and self._noted_of[party] < _MAX_NOTED:
                    self._noted.add((digest, party))
                    self._noted_of[party] += 1
                    self.note("refused", digest, party, reason=_reason(error))
                raise
            last = 1 + max((r.order for r in self.records.values()), default=0)
            if record is None:
                named = len(signed.job.workers)
                self._refuse_expired()
                self.room.require(party, bytes_of(named))
                self.files.write(signed)
                new = Record(last, signed.job.provider, signed.job.owner, signed.job.expires, named=named)
                self.enter(digest, new, "submitted", party=party)
                self.jobs[digest] = signed
            elif record.status == "failed":  # to the end of the queue: one that always fails must not hold up others
                self._again[digest] += 1
                if self._again[digest] > _MAX_NOTED:
                    raise UsageError("the job has failed too often", expected=f"at most {_MAX_NOTED} times")
                again = replace(record, status="waiting", reason="", order=last, starts=0, retired=False)
                if record.retired:
                    self._refuse_expired()
                    self.room.require(party, again.bytes - record.bytes)
                self.files.write(signed)
                self.enter(digest, again, "submitted-again", party=party, step=record.checkpoint_step)
                self.jobs[digest] = signed
            self.review()
        return digest

    def check(self, signed: SignedJob) -> None:
        """Check what a job itself tells, as of now. Raises ConsentError, as `check_job`."""
        check_job(signed, enclaves=self._enclaves, now=time.time(), ended=self._ended())

    def _refuse_expired(self) -> None:
        """Refuse what has waited too long for its inputs."""
        for digest, record in list(self.records.items()):
            if record.expires <= time.time() and record.status == "waiting":
                self._refuse(digest, ConsentError("job has expired while it waited for its inputs"))

    def _lost(self, digest: str) -> None:
        """The disk has lost the job's file; what was queued or running can be submitted again."""
        record = self.records[digest]
        if record.status not in ENDED:
            lost = replace(record, status="failed", reason="JobFileLost", ended=int(time.time()))
            self.enter(digest, lost, "failed", cause=lost.reason)

    def review(self) -> None:
        """Queue the waiting jobs whose inputs are all there, or refuse them by their owners' terms."""
        with self.state.lock:
            ended = self._ended()  # what cannot be read there is the operator's fault, and refuses no job
            for digest, record in list(self.records.items()):
                if record.status != "waiting" or self.missing(digest):
                    continue
                try:
                    self._check(digest, ended)
                except ObfuscatuneError as error:
                    self._refuse(digest, error)
                else:
                    self.room.charge(digest)
                    profile = _word(self.jobs[digest].job.profile_name)
                    self.enter(digest, replace(record, status="queued"), "queued", profile=profile)
            self.changed.notify_all()

    def _check(self, digest: str, ended: Container[str]) -> dict[str, Input]:
        """Check a job and its inputs against what both owners have agreed to, as of now; return the inputs by kind."""
        signed, now = self.jobs[digest], time.time()
        check_job(signed, enclaves=self._enclaves, now=now, ended=ended)
        inputs = {}
        for kind, file in signed.job.inputs.items():
            found = read_header(self.store.path(file))
            terms = check_input(signed, kind, found.digest, found.header, now=now)
            inputs[kind] = Input(file, getattr(signed.job, OWNERS[kind]), terms)
        if not self.records[digest].used:
            self.uses.check(inputs)
        return inputs

    def _refuse(self, digest: str, error: ObfuscatuneError) -> None:
        # A refusal's text goes to the parties: it holds names of profiles and roles, and digests.
        reason = str(error)[:500] if isinstance(error, ConsentError) else _reason(error)
        self._end(digest, replace(self.records[digest], status="refused", reason=reason), cause=_reason(error))

    def next(self) -> str | None:
        """Mark the first queued job as running and return its digest, if there is one.

        It may have been queued for long: whether both owners still agree is checked again.
        """
        with self.state.lock:
            queued = [(record.order, digest) for digest, record in self.records.items() if record.status == "queued"]
            if not queued or self.state.handed:
                return None
            _, digest = min(queued)
            ended = self._ended()
            try:
                inputs = self._check(digest, ended)
            except ConsentError as error:
                self._refuse(digest, error)
                return None
            except ObfuscatuneError as error:  # the disk lost an input, or changed it
                self.failed(digest, error)
                return None
            record = self.records[digest]
            started = replace(record, status="running", starts=record.starts + 1, used=True)
            undo = self.uses.count({} if record.used else inputs)
            try:
                self.enter(digest, started, "started", starts=started.starts)
            except BaseException:
                undo()
                raise
            return digest

    def has_queued(self) -> bool:
        """Return whether a job is queued."""
        with self.state.lock:
            return not self.state.handed and any(record.status == "queued" for record in self.records.values())

    def placed(self, digest: str, workers: list[dict[str, Any]]) -> None:
        """Enter which worker has got what of the model; an entry of the log for each."""
        with self.state.lock:
            self.require_here()
            kept = [{name: part[name] for name in ("worker", "blocks", "parameters", "form")} for part in workers]
            record = self.records[digest]  # the job has the operators' names
            self.put(digest, replace(record, workers=kept[: max(WORKERS, record.named)]))
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
            if record.status in ENDED:
                raise UsageError("the job has ended", got=record.status, hint="obfuscatune job delete")
            if record.cancelled:
                return
            self.note("cancel", digest, party)
            if record.status == "running":
                self.put(digest, replace(record, cancelled=True))
                self.commit()
            else:
                self._end(digest, replace(record, status="cancelled"))

    def is_cancelled(self, digest: str) -> bool:
        """Return whether a party has asked for the end of a running job."""
        return self.record(digest).cancelled

    def is_gone(self, digest: str) -> bool:
        """Return whether nothing of a job may be used any more: it was deleted, or one of its parties has left."""
        with self.state.lock:
            record = self.records.get(digest)
            if record is None or record.retired or record.status == "deleted":
                return True
            return record.answers_no_more or not self.left().isdisjoint(record.parties)

    def end_jobs_of_who_left(self) -> None:
        """Refuse or cancel what has not ended of the jobs of parties that have left, and remove their sealed inputs.

        Results stay for the partner to fetch. For good: who is admitted again gets neither jobs nor queries back.
        Raises StorageError: it is done at the next start, and no job starts.
        """
        with self.state.lock:
            left, files, marked = self.left(), set(), False
            for digest, record in list(self.records.items()):
                if left.isdisjoint(record.parties):
                    continue
                if record.status in ("waiting", "queued", "failed"):
                    self._refuse(digest, ConsentError("a party of the job has left"))
                elif record.status == "done" and not record.cancelled:
                    self.put(digest, replace(record, cancelled=True))
                    marked = True
                elif record.status == "running" and not record.cancelled:
                    self.note("cancel", digest, next(name for name in record.parties if name in left))
                    self.put(digest, replace(record, cancelled=True))
                    self.commit()
                if digest in self.jobs:
                    files |= set(self.jobs[digest].job.inputs.values())
            if marked:
                self.commit()
            self.drop(files)
            self.changed.notify_all()

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
            files = set(record.results.values())
            if digest in self.jobs:
                files |= set(self.jobs[digest].job.inputs.values())
            self._end(digest, replace(record, status="deleted", results={}), by=party)
            self.drop(files)

    def progress(self, digest: str, step: int, steps: int, answering: float = 0.0) -> None:
        """Note how far a running job is, and for how many seconds it stood still; in memory until the next commit."""
        with self.state.lock:  # bounded: a number that the state cannot hold would stop all jobs
            step, steps = min(step, _MAX_STEPS), min(steps, _MAX_STEPS)
            self.put(digest, replace(self.records[digest], step=step, steps=steps, answering=int(answering)))

    def checkpointed(self, digest: str, step: int, checkpoint: str) -> None:
        """Make a checkpoint the one to resume from, and drop the one before."""
        with self.state.lock:
            before = self.records[digest]
            now = replace(before, checkpoint=checkpoint, checkpoint_step=step, step=step, starts=0)
            self.enter(digest, now, "checkpoint", step=step, file=checkpoint)
            self.room.charge(digest)
            self.drop({before.checkpoint})

    def finished(self, digest: str, results: dict[str, str]) -> None:
        """Enter the results; the checkpoint is dropped."""
        with self.state.lock:
            if self.records[digest].cancelled:  # asked for after the last step
                self._end(digest, replace(self.records[digest], status="cancelled"))
                self.drop(results.values())
                return
            files = {f"{kind}-file": file for kind, file in results.items()}
            done = replace(self.records[digest], status="done", reason="", results=results)
            self._end(digest, done, **files)
            self.room.charge(digest)

    def paused(self, digest: str, paused: bool) -> None:
        """Note that a running job waits for the disk; kept in memory."""
        with self.state.lock:
            self.put(digest, replace(self.records[digest], reason=PAUSED if paused else ""))

    def failed(self, digest: str, error: BaseException) -> None:
        """Enter that a job failed, or was cancelled or refused; who submits one that failed again resumes it.

        Of the error its class only: the text may name columns of one owner's data, or layers of the other's model. Of
        a refusal what it is about, too: the enclave's own words, without the count, which tells one owner of the
        other's file. It is for good, since the same job would be refused again.
        """
        with self.state.lock:
            if self.records[digest].cancelled:
                self._end(digest, replace(self.records[digest], status="cancelled"))
                return
            if isinstance(error, ConsentError) and not isinstance(error, LackingError):
                self._refuse(digest, ConsentError(error.what))
                return
            reason = error.what if isinstance(error, LackingError) else _reason(error)
            record = replace(self.records[digest], status="failed", reason=reason, ended=int(time.time()))
            self.enter(digest, record, "failed", cause=_reason(error))

    def fetched(self, digest: str, party: str, kind: str) -> None:
        """Note that a party has fetched a result to its end; the log told when it began."""
        with self.state.lock:
            record, job = self.records[digest], self.jobs[digest].job
            name = f"{job.role_of(self.name_in(job, party))} {kind}"
            if name not in record.fetched:
                self.put(digest, replace(record, fetched=(*record.fetched, name)))
                self.commit()

    def _end(self, digest: str, record: Record, **details: str) -> None:
        """Enter the end of a job, by its status; nothing resumes it, so the checkpoint goes."""
        self.enter(
            digest,
            replace(record, checkpoint=None, checkpoint_step=0, ended=int(time.time())),
            record.status,
            **details,
        )
        self.drop({record.checkpoint})
        if digest in self.jobs and not (left := self.left()).isdisjoint(record.parties):
            job = self.jobs[digest].job
            files = {file for kind, file in job.inputs.items() if getattr(job, OWNERS[kind]) in left}
            self.drop(files)


def _word(name: str) -> str:
    """A profile's name for the log, which the job's digest tells in full."""
    return name if len(name) <= _MAX_WORD else f"{name[: _MAX_WORD - 3]}..."


def _reason(error: BaseException) -> str:
    return type(error).__name__
