"""Room for jobs in the book, which parties share (`shares`): where one needs some, its oldest ended jobs are retired.

Files and results of a retired job go, a line stays. First those whose results were all fetched, then those that ended
a week ago.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from obfuscatune.errors import StorageError, UsageError
from obfuscatune.service.consent import OWNERS
from obfuscatune.service.ledger import Ledger
from obfuscatune.service.records import ENDED, unfetched
from obfuscatune.service.shares import Parties, room_for
from obfuscatune.service.uses import BYTES as USE_BYTES
from obfuscatune.service.uses import Uses

logger = logging.getLogger(__name__)
MAX_BYTES = 8 << 20  # of all records, by `Record.bytes`: the state's limits are above
KEPT_SECONDS = 7 * 86_400  # for which results that nobody has fetched make no room


class Room:
    """The room of a ledger, whose lock each method takes.

    Args:
        ledger: of the jobs. uses: of their inputs, which take room too. parties: who shares it.
    """

    def __init__(self, ledger: Ledger, uses: Uses, parties: Parties) -> None:
        self.ledger, self.uses, self.parties = ledger, uses, parties

    def require(self, party: str, size: int) -> None:
        """See that a party has room for a record of ``size`` bytes and for a file, or make it.

        Raises:
            UsageError: there is none. StorageError: the disk refuses; nothing is lost.
        """
        with self.ledger.state.lock:
            self.drop_expired()
            if not self._has(party, size):
                self.uses.forget(time.time(), self.ledger.needed())
                self.make(party, lambda: self._has(party, size))
            if not self._has(party, size):
                hint = "fetch the results of earlier jobs: what was fetched makes room; unfetched ones do after a week"
                raise UsageError("no room for another job of this party", hint=hint)

    def _has(self, party: str, size: int) -> bool:
        return self.of(party) >= size and self.ledger.store.room(party) > 0

    def of(self, party: str) -> int:
        """Return how many bytes of records a party may add."""
        used: Counter[str] = Counter()
        records = self.ledger.records.values()
        for record in records:
            for name in record.parties:
                used[name] += record.bytes
        counts = self.uses.used()
        for name in counts:
            used[name] += USE_BYTES
        taken = sum(record.bytes for record in records) + USE_BYTES * len(counts)
        return room_for(party, total=MAX_BYTES, taken=taken, used=used, parties=self.parties())

    def make(self, party: str, enough: Callable[[], bool]) -> None:
        """Retire jobs of a party that have ended, the oldest first, until there is enough room or none is left.

        Raises:
            StorageError: the disk refuses; nothing is lost.
        """
        with self.ledger.state.lock:
            now, names = time.time(), self.ledger.names(party)
            ended = [
                (self._may_be_wanted(digest), record.order, digest)
                for digest, record in self.ledger.records.items()
                if not names.isdisjoint(record.parties) and record.status in ENDED and not record.retired
            ]
            for wanted, _, digest in sorted(ended):
                if enough():
                    return
                if not wanted or self.ledger.records[digest].ended <= now - KEPT_SECONDS:
                    self.retire(digest)

    def _may_be_wanted(self, digest: str) -> bool:
        """Whether somebody may still want something of a job that has ended: results, queries, another start."""
        record, signed = self.ledger.records[digest], self.ledger.jobs.get(digest)
        if signed is None or record.status not in ("done", "failed"):
            return False
        alive = time.time() < record.expires
        asks = bool(signed.job.queries_by) and record.queries < signed.job.max_queries and not record.answers_no_more
        return bool(unfetched(record, signed)) or (alive and (record.status == "failed" or asks))

    def retire(self, digest: str) -> None:
        """Let a job's files go, but those that another job needs; the entry first."""
        with self.ledger.state.lock:
            record = self.ledger.records[digest]
            files = {*record.results.values()} | ({record.checkpoint} if record.checkpoint else set())
            if digest in self.ledger.jobs:
                files |= set(self.ledger.jobs[digest].job.inputs.values())
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
            self.ledger.enter(digest, left, "retired")
            self.ledger.jobs.pop(digest, None)
            try:
                self.ledger.files.remove(digest)
            except StorageError as error:
                logger.warning("%s", error)
            self.ledger.drop(files)

    def drop_expired(self) -> None:
        """Drop the lines of retired jobs that could not be submitted any more.

        What is dropped stays over, whatever the clock says later: `State.forgotten`.
        """
        state = self.ledger.state
        with state.lock:
            for digest, record in list(self.ledger.records.items()):
                if record.expires <= time.time() and record.retired:
                    state.forgotten = max(state.forgotten, record.expires)
                    self.ledger.put(digest, None)

    def charge(self, digest: str) -> None:
        """Let the files of a job count for the parties that they belong to."""
        record, job, store = self.ledger.records[digest], self.ledger.jobs[digest].job, self.ledger.store
        for kind, source in job.inputs.items():
            store.charge(source, getattr(job, OWNERS[kind]))
        for file in (*record.results.values(), record.checkpoint):
            if file is not None:
                store.charge(file, *record.parties)
