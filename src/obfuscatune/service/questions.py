"""The quota of questions that a job's results answer: counted before they are answered, given back where they were not.

The last few questions stay in the record, so that who asks one again after a crash pays once. All that decides an
answer is in its question, the seed too, so nobody gets a second answer for it.
"""

import time
from collections import Counter
from collections.abc import Collection
from dataclasses import replace

from obfuscatune.errors import ConsentError, UsageError
from obfuscatune.service.consent import check_query
from obfuscatune.service.ledger import Ledger
from obfuscatune.service.records import USED_UP

MAX_COUNTED = 8  # questions of a job, as many as its parties may have under way
_MAX_GIVEN_BACK = 1000  # of a job, in one life of the enclave: the log must not be flooded


class Questions:
    """The questions counted in a ledger. ``question`` is always the digest of all of one, its prompts and its seed."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._given_back: Counter[str] = Counter()

    def check(self, digest: str, party: str, prompts: int, tokens: int, question: str = "") -> None:
        """Check that a party may now ask for completions of ``prompts`` prompts, of up to ``tokens`` tokens each.

        Prompts of a question that was counted and not answered are not counted again.

        Raises:
            UsageError: the job is not done. ConsentError: beyond the job, see `consent`.
        """
        self._ledger.require_here()
        record = self._ledger.record(digest)
        if record.status != "done":
            hint = "make a new one, and let both sign it" if record.status in USED_UP else "obfuscatune job watch"
            raise UsageError("the job is not done", got=record.status, hint=hint)
        if record.answers_no_more or not self._ledger.left().isdisjoint(record.parties):
            raise ConsentError("a party of the job has left", hint="fetch its results; it answers no more")
        job, prompts = self._ledger.signed(digest).job, 0 if question in record.counted.split() else prompts
        name = self._ledger.name_in(job, party)
        check_query(job, name, prompts=prompts, before=record.queries, tokens=tokens, now=time.time())

    def count(
        self, digest: str, party: str, prompts: int, tokens: int, question: str, under_way: Collection[str] = ()
    ) -> bool:
        """Count prompts before they are answered, so that no crash gives any away; checks and raises as above.

        ``under_way``: questions that are being answered. They are forgotten last, however many come after them.

        Returns whether they were counted now: only then may `give_back` give them back.
        """
        with self._ledger.state.lock:
            self.check(digest, party, prompts, tokens, question)
            record = self._ledger.records[digest]
            known = record.counted.split()
            if question in known:  # no entry in the log, which nobody may fill for nothing
                return False
            known.sort(key=lambda other: other in under_way)
            last = " ".join([*known, question][-MAX_COUNTED:])
            counted = replace(record, queries=record.queries + prompts, counted=last)
            self._ledger.enter(digest, counted, "query", party=party, prompts=prompts)
            return True

    def give_back(self, digest: str, party: str, prompts: int, question: str) -> None:
        """Give back the prompts of a question that was counted and not answered, up to 1,000 times in a job."""
        with self._ledger.state.lock:
            record = self._ledger.records.get(digest)
            if record is None or question not in record.counted.split():  # forgotten since, or given back before
                return
            self._given_back[digest] += 1
            if self._given_back[digest] > _MAX_GIVEN_BACK:  # it stays counted, and can be asked again for nothing
                return
            left = " ".join(other for other in record.counted.split() if other != question)
            given_back = replace(record, queries=max(0, record.queries - prompts), counted=left)
            self._ledger.enter(digest, given_back, "query-failed", party=party, prompts=prompts)
