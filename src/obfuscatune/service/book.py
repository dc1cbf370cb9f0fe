"""The book of jobs: what was submitted, what is waiting for what, what came out. Kept in the sealed state.

    waiting  --all inputs there-->  queued  -->  running  -->  done
       |                              |             |
       +--------consent lacks---------+             +-->  failed  --submitted again-->  waiting
                      |
                   refused

    waiting, queued, running  --a party cancels-->  cancelled
    waiting, done, failed, refused, cancelled  --a party deletes-->  deleted: no sealed file of it is left here

A job runs once: whoever submits it again after that is refused, as its digest stays in the book until it has expired.
What is entered here is in the audit log too, the entry first, and both are committed before anything is done about it.
Where the disk refuses either, the book stays as it was.

Parties share the book and the store (`shares`). Where a party needs room, its oldest jobs that have ended are retired:
files and results go, a line stays. First those whose results were all fetched, then those that ended a week ago.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Container
from dataclasses import replace
from typing import Any

from obfuscatune.errors import ConsentError, ObfuscatuneError, StorageError, UsageError
from obfuscatune.parties.job import SignedJob
from obfuscatune.parties.sealed.header import read_header
from obfuscatune.service.consent import OWNERS, check_input, check_job, check_query
from obfuscatune.service.log import AuditLog
from obfuscatune.service.records import ENDED, USED_UP, WORKERS, JobFiles, Record, bytes_of, recipients, unfetched
from obfuscatune.service.shares import Parties, room_for
from obfuscatune.service.state import State
from obfuscatune.service.store import Store
from obfuscatune.service.uses import BYTES as USE_BYTES
from obfuscatune.service.uses import Input, Uses

logger = logging.getLogger(__name__)
MAX_STARTS = 5  # without a checkpoint in between: a job that brings the enclave down must not do so for ever
MAX_BYTES = 8 << 20  # of all records, by `Record.bytes`: the state's limits are above
KEPT_SECONDS = 7 * 86_400  # for which results that nobody has fetched make no room
# In one life of the enclave, since the log must not be flooded: refusals of a party that it tells of, queries of a job
# that are given back, and times that a failed job is taken in again.
_MAX_NOTED = 1000
_MAX_STEPS = 1 << 53
_MAX_WORD = 80  # of the log
MAX_COUNTED = 8  # questions of a job, as many as its parties may have under way
PAUSED = "paused until the disk has room"


class Book:
    """The jobs of this enclave. Every method may be called from several threads.

    Args:
        state: where it is kept, under its lock. log: of all that happens. store: of the inputs and results.
        parties: who shares it. ended: gives the fingerprints of whom no job may be; asked whenever consent is
            checked. left: of parties that have left, under whatever identity.
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
    ) -> None:
        self.state, self.log, self.store, self._parties, self._ended = state, log, store, parties, ended
        self._left, self._enclaves, self._uses = left, state.fingerprints, Uses(state)
        self.committed: Callable[[], None] = lambda: None  # called after each commit, and before anything is done
        self.changed = threading.Condition(state.lock)
        self._files = JobFiles(store.directory / "jobs")
        self._records = {digest: Record.from_fields(fields) for digest, fields in state.jobs.items()}
        kept = {digest for digest, record in self._records.items() if not record.retired}
        self._signed = {digest: signed for digest in kept if (signed := self._files.read(digest)) is not None}
        self._noted: set[tuple[str, str]] = set()
        self._noted_of: Counter[str] = Counter()
        self._given_back: Counter[str] = Counter()
        self._again: Counter[str] = Counter()
        self._committed = log.length
        with state.lock:
            if state.handed:  # nothing of it is ours to change
                return
            self._files.remove_all_but(kept)
            store.remove_unnamed(self._named())
            for digest in self._signed:
                self._charge(digest)
            for digest in kept - set(self._signed):
                self._lost(digest)
            for digest, record in list(self._records.items()):
                if record.status == "running" and record.cancelled:
                    self._end(digest, replace(record, status="cancelled"))
                elif record.status == "running" and record.starts < MAX_STARTS:  # killed: from the last checkpoint on
                    self._enter(digest, replace(record, status="queued", reason=""), "resumed")
                elif record.status == "running":
                    stopped = replace(record, status="failed", reason="Interrupted", ended=int(time.time()))
                    self._enter(digest, stopped, "failed", cause=stopped.reason)
            self.end_jobs_of_who_left()  # the crash may have come between a removal and this
            self.review()  # or between an upload and its entry

    def submit(self, signed: SignedJob, party: str) -> str:
        """Take a job in, or find it; queue it if nothing is missing. Return its digest.

        Raises:
            ConsentError: see `consent`; or the job was run already. UsageError: the book is full.
        """
        digest = signed.job.digest
        with self.state.lock:
            record = self._records.get(digest)
            try:
                check_job(signed, enclaves=self._enclaves, now=time.time(), ended=self._ended())
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
            last = 1 + max((r.order for r in self._records.values()), default=0)
            if record is None:
                named = len(signed.job.workers)
                self._require_room(party, bytes_of(named))
                self._files.write(signed)
                new = Record(last, signed.job.provider, signed.job.owner, signed.job.expires, named=named)
                self._enter(digest, new, "submitted", party=party)
                self._signed[digest] = signed
            elif record.status == "failed":  # to the end of the queue: one that always fails must not hold up others
                self._again[digest] += 1
                if self._again[digest] > _MAX_NOTED:
                    raise UsageError("the job has failed too often", expected=f"at most {_MAX_NOTED} times")
                again = replace(record, status="waiting", reason="", order=last, starts=0, retired=False)
                if record.retired:
                    self._require_room(party, again.bytes - record.bytes)
                self._files.write(signed)
                self._enter(digest, again, "submitted-again", party=party, step=record.checkpoint_step)
                self._signed[digest] = signed
            self.review()
        return digest

    def _require_room(self, party: str, size: int) -> None:
        self._forget_expired()
        if self._room(party) < size or self.store.room(party) == 0:
            self._uses.forget(time.time(), self._named())
            self.make_room(party, lambda: self._room(party) >= size and self.store.room(party) > 0)
        if self._room(party) < size or self.store.room(party) == 0:
            hint = "fetch the results of earlier jobs: what was fetched makes room; unfetched ones do after a week"
            raise UsageError("no room for another job of this party", hint=hint)

    def _room(self, party: str) -> int:
        used: Counter[str] = Counter()
        for record in self._records.values():
            for name in record.parties:
                used[name] += record.bytes
        counts = self._uses.used()
        for name in counts:
            used[name] += USE_BYTES
        taken = sum(record.bytes for record in self._records.values()) + USE_BYTES * len(counts)
        return room_for(party, total=MAX_BYTES, taken=taken, used=used, parties=self._parties())

    def make_room(self, party: str, enough: Callable[[], bool]) -> None:
        """Retire jobs of a party that have ended, the oldest first, until there is enough room or none is left.

        Raises:
            StorageError: the disk refuses; nothing is lost.
        """
        with self.state.lock:
            now = time.time()
            ended = [
                (self._may_be_wanted(digest), record.order, digest)
                for digest, record in self._records.items()
                if party in record.parties and record.status in ENDED and not record.retired
            ]
            for wanted, _, digest in sorted(ended):
                if enough():
                    return
                if not wanted or self._records[digest].ended <= now - KEPT_SECONDS:
                    self._retire(digest)

    def _may_be_wanted(self, digest: str) -> bool:
        """Whether somebody may still want something of a job that has ended: results, queries, another start."""
        record, signed = self._records[digest], self._signed.get(digest)
        if signed is None or record.status not in ("done", "failed"):
            return False
        alive = time.time() < record.expires
        asks = bool(signed.job.queries_by) and record.queries < signed.job.max_queries
        return bool(unfetched(record, signed)) or (alive and (record.status == "failed" or asks))

    def _retire(self, digest: str) -> None:
        """Let a job's files go, but those that another job needs; the entry first. Under the lock."""
        record = self._records[digest]
        files = {*record.results.values()} | ({record.checkpoint} if record.checkpoint else set())
        if digest in self._signed:
            files |= set(self._signed[digest].job.inputs.values())
        left = replace(
            record,
            retired=True,
            results={},
            checkpoint=None,
            checkpoint_step=0,
            fetched=(),
            counted="",
            steps=0,
            step=0,
            workers=[],
        )
        self._enter(digest, left, "retired")
        self._signed.pop(digest, None)
        try:
            self._files.remove(digest)
        except StorageError as error:
            logger.warning("%s", error)
        for file in files - self._named():
            self._drop(file)

    def _forget_expired(self) -> None:
        """Drop the lines of retired jobs that could not be submitted any more; refuse what has waited too long.

        What is dropped stays over, whatever the clock says later: `State.forgotten`.
        """
        now = time.time()
        for digest, record in list(self._records.items()):
            if record.expires <= now and record.retired:
                self.state.forgotten = max(self.state.forgotten, record.expires)
                self._set(digest, None)
            elif record.expires <= now and record.status == "waiting":
                self._refuse(digest, ConsentError("job has expired while it waited for its inputs"))

    def _named(self) -> set[str]:
        """Return the digests of all files that some job needs."""
        named = {file for record in self._records.values() for file in (*record.results.values(), record.checkpoint)}
        left = self._left()
        for digest, signed in self._signed.items():
            if self._records[digest].status == "running":
                named |= set(signed.job.inputs.values())
            elif self._records[digest].status != "deleted":
                inputs = signed.job.inputs.items()
                named |= {file for kind, file in inputs if getattr(signed.job, OWNERS[kind]) not in left}
        return {file for file in named if file is not None}

    def _charge(self, digest: str) -> None:
        """Let the files of a job count for the parties that they belong to."""
        record, job = self._records[digest], self._signed[digest].job
        for kind, source in job.inputs.items():
            self.store.charge(source, getattr(job, OWNERS[kind]))
        for file in (*record.results.values(), record.checkpoint):
            if file is not None:
                self.store.charge(file, *record.parties)

    def _lost(self, digest: str) -> None:
        """The disk has lost the job's file; what was queued or running can be submitted again."""
        record = self._records[digest]
        if record.status not in ENDED:
            lost = replace(record, status="failed", reason="JobFileLost", ended=int(time.time()))
            self._enter(digest, lost, "failed", cause=lost.reason)

    def review(self) -> None:
        """Queue the waiting jobs whose inputs are all there, or refuse them by their owners' terms."""
        with self.state.lock:
            ended = self._ended()  # what cannot be read there is the operator's fault, and refuses no job
            for digest, record in list(self._records.items()):
                if record.status != "waiting" or self.missing(digest):
                    continue
                try:
                    self._check(digest, ended)
                except ObfuscatuneError as error:
                    self._refuse(digest, error)
                else:
                    self._charge(digest)
                    profile = _word(self._signed[digest].job.profile_name)
                    self._enter(digest, replace(record, status="queued"), "queued", profile=profile)
            self.changed.notify_all()

    def _check(self, digest: str, ended: Container[str]) -> dict[str, Input]:
        """Check a job and its inputs against what both owners have agreed to, as of now; return the inputs by kind."""
        signed, now = self._signed[digest], time.time()
        check_job(signed, enclaves=self._enclaves, now=now, ended=ended)
        inputs = {}
        for kind, file in signed.job.inputs.items():
            found = read_header(self.store.path(file))
            terms = check_input(signed, kind, found.digest, found.header, now=now)
            inputs[kind] = Input(file, getattr(signed.job, OWNERS[kind]), terms)
        if not self._records[digest].used:
            self._uses.check(inputs)
        return inputs

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
            record = self._records[digest]
            started = replace(record, status="running", starts=record.starts + 1, used=True)
            undo = self._uses.count({} if record.used else inputs)
            try:
                self._enter(digest, started, "started", starts=started.starts)
            except BaseException:
                undo()
                raise
            return digest

    def has_queued(self) -> bool:
        """Return whether a job is queued."""
        with self.state.lock:
            return not self.state.handed and any(record.status == "queued" for record in self._records.values())

    def placed(self, digest: str, workers: list[dict[str, Any]]) -> None:
        """Enter which worker has got what of the model; an entry of the log for each."""
        with self.state.lock:
            self._require_here()
            kept = [{name: part[name] for name in ("worker", "blocks", "parameters", "form")} for part in workers]
            record = self._records[digest]  # the job has the operators' names
            self._set(digest, replace(record, workers=kept[: max(WORKERS, record.named)]))
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
                self._set(digest, replace(record, cancelled=True))
                self.commit()
            else:
                self._end(digest, replace(record, status="cancelled"))

    def is_cancelled(self, digest: str) -> bool:
        """Return whether a party has asked for the end of a running job."""
        return self.record(digest).cancelled

    def is_gone(self, digest: str) -> bool:
        """Return whether nothing of a job may be used any more: it was deleted, or one of its parties has left."""
        with self.state.lock:
            record = self._records.get(digest)
            if record is None or record.retired or record.status == "deleted":
                return True
            return not self._left().isdisjoint(record.parties)

    def end_jobs_of_who_left(self) -> None:
        """Refuse or cancel what has not ended of the jobs of parties that have left, and remove their sealed inputs.

        Results stay for the partner to fetch. Raises StorageError: it is done at the next start, and no job starts.
        """
        with self.state.lock:
            left, files = self._left(), set()
            for digest, record in list(self._records.items()):
                if left.isdisjoint(record.parties):
                    continue
                if record.status in ("waiting", "queued"):
                    self._refuse(digest, ConsentError("a party of the job has left"))
                elif record.status == "running" and not record.cancelled:
                    self.note("cancel", digest, next(name for name in record.parties if name in left))
                    self._set(digest, replace(record, cancelled=True))
                    self.commit()
                if digest in self._signed:
                    files |= set(self._signed[digest].job.inputs.values())
            for file in files - self._named():
                self._drop(file)
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
            if digest in self._signed:
                files |= set(self._signed[digest].job.inputs.values())
            self._end(digest, replace(record, status="deleted", results={}), by=party)
            for file in files - self._named():
                self._drop(file)

    def progress(self, digest: str, step: int, steps: int, answering: float = 0.0) -> None:
        """Note how far a running job is, and for how many seconds it stood still; in memory until the next commit."""
        with self.state.lock:  # bounded: a number that the state cannot hold would stop all jobs
            step, steps = min(step, _MAX_STEPS), min(steps, _MAX_STEPS)
            self._set(digest, replace(self._records[digest], step=step, steps=steps, answering=int(answering)))

    def checkpointed(self, digest: str, step: int, checkpoint: str) -> None:
        """Make a checkpoint the one to resume from, and drop the one before."""
        with self.state.lock:
            before = self._records[digest]
            now = replace(before, checkpoint=checkpoint, checkpoint_step=step, step=step, starts=0)
            self._enter(digest, now, "checkpoint", step=step, file=checkpoint)
            self._charge(digest)
            if before.checkpoint != checkpoint:
                self._drop(before.checkpoint)

    def finished(self, digest: str, results: dict[str, str]) -> None:
        """Enter the results; the checkpoint is dropped."""
        with self.state.lock:
            if self._records[digest].cancelled:  # asked for after the last step
                self._end(digest, replace(self._records[digest], status="cancelled"))
                for file in results.values():
                    self._drop(file)
                return
            files = {f"{kind}-file": file for kind, file in results.items()}
            done = replace(self._records[digest], status="done", reason="", results=results)
            self._end(digest, done, **files)
            self._charge(digest)

    def paused(self, digest: str, paused: bool) -> None:
        """Note that a running job waits for the disk; kept in memory."""
        with self.state.lock:
            self._set(digest, replace(self._records[digest], reason=PAUSED if paused else ""))

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
            record = replace(self._records[digest], status="failed", reason=reason, ended=int(time.time()))
            self._enter(digest, record, "failed", cause=_reason(error))

    def check_query(self, digest: str, party: str, prompts: int, tokens: int, question: str = "") -> None:
        """Check that a party may now ask for completions of ``prompts`` prompts, of up to ``tokens`` tokens each.

        ``question`` is the digest of all of it: prompts of one that was counted and not answered are not counted again.

        Raises:
            UsageError: the job is not done. ConsentError: beyond the job, see `consent`.
        """
        self._require_here()
        record = self.record(digest)
        if record.status != "done":
            hint = "make a new one, and let both sign it" if record.status in USED_UP else "obfuscatune job watch"
            raise UsageError("the job is not done", got=record.status, hint=hint)
        if not self._left().isdisjoint(record.parties):
            raise ConsentError("a party of the job has left", hint="fetch its results; it answers no more")
        job, prompts = self.signed(digest).job, 0 if question in record.counted.split() else prompts
        check_query(job, party, prompts=prompts, before=record.queries, tokens=tokens, now=time.time())

    def count_query(self, digest: str, party: str, prompts: int, tokens: int, question: str) -> bool:
        """Count prompts before they are answered, so that no crash gives any away; checks and raises as above.

        Returns whether they were counted now: only then may `query_failed` give them back.

        The last few questions stay in the record, so that who asks one again after a crash pays once. All that decides
        an answer is in its question, the seed too, so nobody gets a second answer for it.
        """
        with self.state.lock:
            self.check_query(digest, party, prompts, tokens, question)
            record = self._records[digest]
            known = record.counted.split()
            if question in known:  # no entry in the log, which nobody may fill for nothing
                return False
            last = " ".join([*known, question][-MAX_COUNTED:])
            counted = replace(record, queries=record.queries + prompts, counted=last)
            self._enter(digest, counted, "query", party=party, prompts=prompts)
            return True

    def query_failed(self, digest: str, party: str, prompts: int, question: str) -> None:
        """Give back the prompts of a query that was counted and not answered, up to 1,000 times in a job."""
        with self.state.lock:
            record = self._records.get(digest)
            if record is None or question not in record.counted.split():  # forgotten since, or given back before
                return
            self._given_back[digest] += 1
            if self._given_back[digest] > _MAX_NOTED:  # it stays counted, and can be asked again for nothing
                return
            left = " ".join(other for other in record.counted.split() if other != question)
            given_back = replace(record, queries=max(0, record.queries - prompts), counted=left)
            self._enter(digest, given_back, "query-failed", party=party, prompts=prompts)

    def fetched(self, digest: str, party: str, kind: str) -> None:
        """Note that a party has fetched a result to its end; the log told when it began."""
        with self.state.lock:
            record = self._records[digest]
            name = f"{self._signed[digest].job.role_of(party)} {kind}"
            if name not in record.fetched:
                self._set(digest, replace(record, fetched=(*record.fetched, name)))
                self.commit()

    def results_for(self, digest: str, party: str) -> dict[str, str]:
        """Return the digests of the results that a job gives to a party, by kind."""
        with self.state.lock:
            record, signed = self.record(digest), self._signed.get(digest)
            role = None if signed is None else signed.job.role_of(party)
            return {kind: file for kind, file in record.results.items() if signed and role in recipients(signed, kind)}

    def operators_of(self, digest: str) -> dict[str, str]:
        """Return the operators of a job's workers by fingerprint; none of a job whose files have made room."""
        with self.state.lock:
            signed = self._signed.get(digest)
            return {} if signed is None else {each.fingerprint: each.operator for each in signed.job.workers}

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
                self._commit()
            except BaseException:
                self.state.handed = {}
                raise
            self.changed.notify_all()

    def _require_here(self) -> None:
        if self.state.handed:
            hint = "the new enclave goes on with it"
            raise ConsentError("the enclave was handed over", got=f"to {self.state.handed['to'][:16]}", hint=hint)

    def note(self, event: str, job: str | None = None, party: str | None = None, **details: str | int) -> None:
        """Write an entry into the log and commit it."""
        with self.state.lock:
            self._require_here()
            self.log.append(event, job=job, party=party, **details)
            self.commit()

    def commit(self) -> None:
        """Seal the book and the log's head; raises ConsentError once it was handed over, and as `State.commit`."""
        with self.state.lock:
            self._require_here()
            self._commit()

    def _commit(self) -> None:
        with self.state.lock:
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

    def record(self, digest: str) -> Record:
        """Return the record of a job as it is now; raises UsageError where there is none."""
        with self.state.lock:
            if digest not in self._records:
                raise UsageError("no such job", hint="submit it first")
            return self._records[digest]

    def signed(self, digest: str) -> SignedJob:
        """Return the job with its signatures; raises as :meth:`record`."""
        self.record(digest)
        signed = self._signed.get(digest)
        if signed is None:
            raise UsageError("the job is over and its files have made room for others'")
        return signed

    def job_of(self, digest: object, party: str) -> tuple[str, Record]:
        """Return digest and record of a job in which an identity has a role.

        Raises:
            UsageError: there is none, with one answer for a job that is not there and for one of others.
        """
        with self.state.lock:
            record = self._records.get(digest) if isinstance(digest, str) else None
            if record is None or party not in record.parties:
                raise UsageError("no such job of this party", hint="obfuscatune job submit")
            return str(digest), record

    def jobs_of(self, party: str) -> list[str]:
        """Return the jobs in which an identity has a role, oldest first: no more than its share of the book holds."""
        with self.state.lock:
            found = [(record.order, digest) for digest, record in self._records.items() if party in record.parties]
        return [digest for _, digest in sorted(found)]

    def missing(self, digest: str) -> dict[str, str]:
        """Return the inputs that are not there yet, digest by kind."""
        return {kind: file for kind, file in self.signed(digest).job.inputs.items() if not self.store.has(file)}

    def _end(self, digest: str, record: Record, **details: str) -> None:
        """Enter the end of a job, by its status; nothing resumes it, so the checkpoint goes."""
        self._enter(
            digest,
            replace(record, checkpoint=None, checkpoint_step=0, ended=int(time.time())),
            record.status,
            **details,
        )
        self._drop(record.checkpoint)
        if digest in self._signed and not (left := self._left()).isdisjoint(record.parties):
            job = self._signed[digest].job
            files = {file for kind, file in job.inputs.items() if getattr(job, OWNERS[kind]) in left}
            for file in files - self._named():
                self._drop(file)

    def _enter(
        self, digest: str, record: Record, event: str, *, party: str | None = None, **details: str | int
    ) -> None:
        """Log a change, make it, commit both."""
        self._require_here()
        before = self._records.get(digest)
        self.log.append(event, job=digest, party=party, **details)
        self._set(digest, record)
        try:
            self.commit()
        except BaseException:  # what is not committed is not acted upon
            self._set(digest, before)
            raise
        self.changed.notify_all()

    def _set(self, digest: str, record: Record | None) -> None:
        """Put a record into the book and into what the next commit seals; None takes it out."""
        if record is None:
            del self._records[digest]
            self.state.jobs.pop(digest, None)
        else:
            self._records[digest], self.state.jobs[digest] = record, record.to_fields()

    def _drop(self, file: str | None) -> None:
        """Remove a file that no job needs any more. Where the disk refuses, the next start removes it."""
        try:
            if file is not None:
                self.store.remove(file)
        except StorageError as error:
            logger.warning("%s", error)


def _word(name: str) -> str:
    """A profile's name for the log, which the job's digest tells in full."""
    return name if len(name) <= _MAX_WORD else f"{name[: _MAX_WORD - 3]}..."


def _reason(error: BaseException) -> str:
    return type(error).__name__
