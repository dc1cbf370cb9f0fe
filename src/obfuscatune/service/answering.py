"""The queries that wait, and how the thread that has the model answers them: in turns, in batches, in their order.

Queries of one job's model share a batch. One that comes later joins between two rounds, as long as no query of another
job waits: that one's model has to be loaded, and it must not wait for ever.

Nobody's long answers keep others out: while other queries wait, or a job does, those under way get `TURN_SECONDS`. Then
they go to the end of the queue with what they have, or go on between the steps of the job.
"""

import collections
import logging
import time
from collections.abc import Callable, Collection, Iterable
from typing import Protocol

from obfuscatune.errors import BusyError, ConsentError, ObfuscatuneError
from obfuscatune.parties.job import SignedJob
from obfuscatune.parties.vocabulary import TURN_SECONDS
from obfuscatune.service.answers import Answers
from obfuscatune.service.book import Book
from obfuscatune.service.generation import Enough, Row
from obfuscatune.service.queries import Query

logger = logging.getLogger(__name__)
MAX_ROWS = 8  # computed together
LEAST_STEPS, PREFILL_SHARE = 8, 8  # of a round that ends to let a query in: taking the others up costs their prefill
# What ends the service. A panic in a tokenizer's Rust is no Exception, and a party's file can make one.
STOPS = (SystemExit, KeyboardInterrupt)


class Model(Protocol):
    """What has the models: a `Runner`."""

    def check(self, signed: SignedJob, adapter: str, query: Query) -> list[Row]:
        """Return the rows of a query, once the model is loaded."""

    def answer(self, signed: SignedJob, adapter: str, rows: list[Row], enough: Enough) -> None:
        """Compute one round."""


class Answering:
    """Queries under way. :meth:`add` from any thread, the rest from the one that has the model.

    Args:
        book: of the jobs. model: what computes. answers: that are remembered.
        stopped: whether the operator stops the enclave; then what was begun is still answered.
    """

    def __init__(self, book: Book, model: Model, answers: Answers, stopped: Callable[[], bool]) -> None:
        self._book, self._model, self._answers = book, model, answers
        self._stopped = stopped
        self._waiting: collections.deque[Query] = collections.deque()
        self._begun: dict[int, tuple[Query, list[Row]]] = {}
        self._set_aside: dict[int, tuple[Query, list[Row]]] = {}  # begun, and in the queue again
        self._spent = 0.0  # seconds of rounds since those under way began, or were taken up
        self._paid: set[str] = set()  # questions that were counted when a query under way began
        self._job = ""  # whose model those that have begun are for
        self._leaving: float | None = None  # when the enclave ends, whatever is not answered by then
        self._alone = False  # whether a batch has failed: its queries are computed one by one, and one fails alone

    def add(self, query: Query) -> None:
        """Let a query wait for its turn."""
        with self._book.changed:
            # Without those whose party waits no longer: one that asks and leaves must not fill the memory.
            for gone in [one for one in self._waiting if one.left or not one.prompts]:
                self._waiting.remove(gone)
                self._set_aside.pop(id(gone), None)
                self._forget(gone)
                gone.finish([])
            self._waiting.append(query)
            self._book.changed.notify_all()

    def expel(self, parties: Collection[str]) -> None:
        """Compute nothing more for identities that are members no more."""
        with self._book.changed:
            for query in (*self._waiting, *(query for query, _ in tuple(self._begun.values()))):
                if query.party in parties:
                    query.leave()

    @property
    def wanted(self) -> bool:
        """Whether there is anything to answer."""
        with self._book.changed:
            return bool(self._waiting or self._begun)

    def turn(self, seconds: float | None = None) -> None:
        """Answer queries until there are none, or for so many seconds, and then go on at the next turn.

        With ``seconds`` the queries are those of one job, and the time begins when its model is loaded; it ends after
        the token at which it is over. Without, none is begun once a job is queued: it takes them between its steps, and
        those under way when `TURN_SECONDS` are over.
        """
        until: float | None = None
        while True:
            if seconds is not None or not self._book.has_queued():
                self._set_aside_long(other=until is None)
                self._admit(other=until is None)
            elif until is None:
                until = time.monotonic() + max(0.0, TURN_SECONDS - self._spent)
            if not self._begun:
                break
            if seconds is not None and until is None:
                until = time.monotonic() + seconds
            self._round(until)
            if self._is_over(until):
                break
        if self._leaving is not None:
            raise SystemExit(0)

    def hurry(self, seconds: float) -> bool:
        """Return whether queries are being computed: they get so many seconds more, and :meth:`turn` then ends all.

        For a handler of signals, in the thread of :meth:`turn`; a second call says no.
        """
        if self._leaving is not None or not (self._begun or self._set_aside):
            return False
        self._leaving = time.monotonic() + seconds
        return True

    @property
    def hurried(self) -> bool:
        """Whether the next :meth:`turn` ends all."""
        return self._leaving is not None

    def _is_over(self, until: float | None) -> bool:
        ends = until if self._leaving is None else self._leaving
        return ends is not None and time.monotonic() >= ends

    def close(self) -> None:
        """Tell those who wait that nothing comes."""
        with self._book.changed:
            left = [*self._waiting, *(query for query, _ in self._begun.values())]
            self._set_aside.clear()
            self._waiting.clear()
            self._begun.clear()
        for query in left:
            query.fail(BusyError("the enclave is stopping", hint="ask again when it runs"))

    # the steps of a turn

    def _admit(self, other: bool) -> None:
        """Begin queries that wait: of the job of those before them; where none is under way and ``other``, of any.

        Once the enclave is stopped, only those that were begun before, and set aside.
        """
        while sum(len(rows) for _, rows in self._begun.values()) < MAX_ROWS:
            with self._book.changed:
                stopped = self._stopped()
                query = next((one for one in self._waiting if not stopped or id(one) in self._set_aside), None)
                if query is None or (query.job != self._job and (self._begun or not other)):
                    return
                self._waiting.remove(query)
                self._job = query.job
            self._begin(query)

    def _set_aside_long(self, other: bool) -> None:
        """Let others take the place of queries that have had their time: ``other``, whosoever's model they need."""
        with self._book.changed:
            if not (self._begun and self._others_wait(other) and self._is_long()) or self._stopped():
                return
            self._waiting.extend(query for query, _ in self._begun.values())
            self._set_aside |= self._begun
            self._begun.clear()
        self._alone, self._spent = False, 0.0

    def _others_wait(self, other: bool) -> bool:
        return bool(self._waiting) and (other or self._waiting[0].job == self._job)

    def _is_long(self) -> bool:
        return self._spent >= TURN_SECONDS

    def _begin(self, query: Query) -> None:
        """Check, count, compute, in this order: a prompt that is refused costs nothing, and no crash gives any away."""
        if (begun := self._set_aside.pop(id(query), None)) is not None:
            self._begun[id(query)] = begun
            return
        try:
            if not query.take():
                return query.finish([])
            asked = (query.job, query.party, len(query.prompts), query.settings.longest, query.question)
            known = self._answers.get(query.question)  # asked twice at once, or answered while whoever asked was away
            if known is not None:
                self._book.questions.check(query.job, query.party, 0, query.settings.longest)  # it was paid for
                return query.finish(known)
            self._book.questions.check(*asked)
            rows = self._model.check(self._book.signed(query.job), self._adapter(query.job), query)
            self._begun[id(query)] = query, rows  # before it is paid for, which `_forget` leaves to who is under way
            under_way = {other.question for other, _ in (*self._begun.values(), *self._set_aside.values())}
            if self._book.questions.count(*asked, under_way=under_way):
                self._paid.add(query.question)
        except STOPS:
            raise
        except BaseException as error:  # goes to the party that asked; the service goes on, and with it the model
            self._begun.pop(id(query), None)
            query.fail(error)

    def _ended(self) -> bool:
        """Whether nobody may use the model any more: the job was deleted, a party has left, the enclave is another."""
        return bool(self._book.state.handed) or self._book.is_gone(self._job)

    def _round(self, until: float | None) -> None:
        begun = list(self._begun.values())
        if self._ended():
            for query, _ in begun:
                self._begun.pop(id(query))
                query.withhold()
                self._forget(query)
                query.fail(ConsentError("the job answers no more", hint="obfuscatune job list"))
            return
        rows = [row for _, found in (begun[:1] if self._alone else begun) for row in found if not row.lapse()]
        before, start = self._spent, 0.0  # what loads the model and takes up the rows does not count

        def enough(steps: int, longest: int) -> bool:
            nonlocal start
            start = start or time.monotonic()
            self._spent = before + time.monotonic() - start
            if self._is_over(until) or self._ended():
                return True
            if self._is_long():
                with self._book.changed:
                    if self._others_wait(until is None) or (until is None and self._book.has_queued()):
                        return True
            if self._alone or steps < max(LEAST_STEPS, longest // PREFILL_SHARE) or len(rows) >= MAX_ROWS:
                return False
            with self._book.changed:
                return bool(self._waiting) and self._waiting[0].job == self._job

        try:
            if rows:
                self._model.answer(self._book.signed(self._job), self._adapter(self._job), rows[:MAX_ROWS], enough)
        except STOPS:
            raise
        except BaseException as error:
            if self._alone or len(begun) == 1:
                self._fail(begun[0][0], error)
            self._alone = True
        self._end(query for query, found in begun if id(query) in self._begun and all(row.done for row in found))
        self._alone, self._spent = self._alone and bool(self._begun), self._spent if self._begun else 0.0

    def _end(self, queries: Iterable[Query]) -> None:
        for query in queries:
            _, rows = self._begun[id(query)]
            try:
                completions = [row.completion() for row in rows]
            except STOPS:
                raise
            except BaseException as error:
                self._fail(query, error)
                continue
            del self._begun[id(query)]
            self._forget(query)
            if not query.left:
                self._paid.discard(query.question)  # a twin that fails gets nothing back for it
                self._answers.put(query.question, completions)
            query.finish(completions)

    def _fail(self, query: Query, error: BaseException) -> None:
        """End a query that was not answered. What it was counted for is given back, unless a part of it was shown.

        Nor is it where another query that asks the same was shown a part, or is under way, nor where the question was
        counted earlier: asked again it costs nothing.
        """
        del self._begun[id(query)]
        paid = query.question in self._paid
        shown = query.withhold()
        self._forget(query)
        try:
            if paid and not shown and query.question not in self._paid and not self._book.state.handed:
                asked = (query.job, query.party, len(query.prompts), query.question)
                self._book.store.require_disk(0)  # else the log may tell what the state does not take
                self._book.questions.give_back(*asked)
        except STOPS:
            raise
        except ObfuscatuneError as refused:
            # It stays counted, and asked again it costs nothing. Answers under way must not wait for a full disk.
            logger.warning("a failed query is not given back: %s", refused.what)
        finally:
            query.fail(error)

    def _forget(self, query: Query) -> None:
        """Its question was counted for nobody who is under way, unless another query asks the same.

        Where a part of the answer was shown, it was paid for that, whoever else asks.
        """
        under_way = (*self._begun.values(), *self._set_aside.values())
        if query.sent or all(other.question != query.question for other, _ in under_way):
            self._paid.discard(query.question)

    def _adapter(self, job: str) -> str:
        return self._book.record(job).results["adapter"]
