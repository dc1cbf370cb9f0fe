"""The enclave that ``obfuscatune connect`` asks: verified, asked, renewed, and given up when it is another one.

Each request goes over a connection of its own, opened for it: the enclave proves itself anew, by a fresh nonce, before
anything is sent. So evidence is never older than the request, a connection that broke costs nothing, and an enclave
that has changed is met before it hears a word; then the session is over.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from obfuscatune.errors import (
    AttestationError,
    BusyError,
    ConnectionClosedError,
    ConsentError,
    ObfuscatuneError,
    ProtocolError,
    RollbackError,
    UsageError,
    printable,
)
from obfuscatune.parties.channel.client import AttestedChannel
from obfuscatune.parties.job import Job
from obfuscatune.parties.vocabulary import TOO_MANY
from obfuscatune.profiles import resolve
from obfuscatune.serving.claims import describe
from obfuscatune.serving.limits import ServerLimits
from obfuscatune.serving.models import NO_FAMILY, Defaults
from obfuscatune.serving.question import NoCompletionError, Question
from obfuscatune.serving.refusal import Refusal
from obfuscatune.serving.seeds import Seeds
from obfuscatune.serving.thread import in_thread
from obfuscatune.training.completion import TOO_LONG

RENEWAL_SECONDS = 60.0
AWAY_SECONDS = 5.0  # until an enclave is looked for again that was not there
POLL_SECONDS = 15.0  # for a reply that needs no computing
CLOSE_SECONDS = 1.0  # that a renewal under way is waited for at the end
AGAIN_SECONDS = 60.0  # for which a question is asked again whose connection broke
_PAUSE = 0.5  # seconds before that
PARALLEL = 4  # queries of one party that an enclave takes at a time
_MOST = 1 << 53  # that an enclave counts
# Of the channel, whose messages are not padded; a stream has one for each token.
ON_THE_WAY = "to the network on the way: when, and how long each question and each piece of its answer is"
_MOST_LETTERS = 64  # of the name of a job's status


class Enclave:
    """The enclave of a job, asked over attested channels.

    Args:
        connect: opens a channel if the policy accepts the enclave and it has the pinned identity. first: the one that
            was judged before anything was served. seconds: for an answer, waiting for a place included.

    Attributes:
        names: of its one model. fault: why the session is over. seeds: of the last requests.
    """

    config, generation_config, defaults = NO_FAMILY, None, Defaults()

    def __init__(
        self, connect: Callable[[], AttestedChannel], first: AttestedChannel, job: Job, name: str, seconds: float
    ) -> None:
        self.job, self.names = job, (name,)
        self.fault: ObfuscatuneError | None = None
        self._connect, self._seconds = connect, seconds
        self._lock = threading.Lock()
        self._verdict, self._judged = first.verdict, time.time()
        self._away = False
        self._channels: set[AttestedChannel] = set()
        self._running = self._waiting = 0
        self._deadlines: set[asyncio.Timeout] = set()
        self._giving_up = False
        self._poll: asyncio.Future[dict[str, Any]] | None = None
        self.seeds = Seeds()
        self._places = asyncio.Semaphore(PARALLEL)
        self._on_fault: Callable[[], None] = lambda: None
        self._ended = threading.Event()
        self._renewing = threading.Thread(target=self._renew, name="renewal", daemon=True)

    def start(self, on_fault: Callable[[], None]) -> None:
        """Judge the enclave again from time to time. on_fault: called once, when the session is over."""
        self._on_fault = on_fault
        self._renewing.start()

    @property
    def alive(self) -> bool:
        """Whether it is the one that was verified, and was there when it was last looked for."""
        return self.fault is None and not self._away

    def give_up(self) -> None:
        """Answer what is under way with 503, and take no more; in the event loop."""
        self._giving_up = True
        for deadline in self._deadlines:
            with contextlib.suppress(RuntimeError):  # over in this moment
                deadline.reschedule(0)

    def close(self) -> None:
        """Judge it no more, and close what is open to it, however it stalls."""
        self._ended.set()
        with self._lock:
            channels = [*self._channels]
        for channel in channels:
            channel.close()
        if self._renewing.ident is not None:
            self._renewing.join(CLOSE_SECONDS)  # longer only while it connects; it ends with the process

    def status(self) -> dict[str, Any]:
        """Verify the enclave, and ask it for the job; raises what it says, and AttestationError, which ends all."""
        with self._verified() as channel:
            seconds = min(POLL_SECONDS, self._seconds)
            try:
                return channel.request({"op": "status", "job": self.job.digest}, timeout=seconds)[0]
            except ConnectionClosedError:
                self._away = True
                raise

    @contextlib.contextmanager
    def _verified(self) -> Iterator[AttestedChannel]:
        """Yield a channel to the enclave, verified anew; another one, or a membership put back, ends the session."""
        if self.fault is not None:
            raise self.fault
        try:
            channel = self._connect()
        except (AttestationError, RollbackError) as error:
            self._end(error)
            raise
        except ObfuscatuneError as error:
            self._away = is_away(error)
            raise
        self._away = False
        try:
            with channel, self._kept(channel):
                yield channel
        except (AttestationError, RollbackError) as error:
            self._end(error)
            raise

    def _end(self, fault: ObfuscatuneError) -> None:
        self.fault = fault
        self._on_fault()

    @contextlib.contextmanager
    def _kept(self, channel: AttestedChannel) -> Iterator[None]:
        with self._lock:
            self._verdict, self._judged = channel.verdict, time.time()
            self._channels.add(channel)
        try:
            if self._ended.is_set():
                raise ConnectionClosedError("this session has ended")
            yield
        finally:
            with self._lock:
                self._channels.discard(channel)

    def ask(self, question: Question) -> None:
        """Ask a question, once more with what it has where the connection broke; in a thread of its own.

        The enclave knows a question that is asked again, and counts it once. It may have no place for one yet: half a
        second passes until it sees that another client has left. Raises what it says, and AttestationError.
        """
        until, broke = time.monotonic() + AGAIN_SECONDS, False
        while True:
            try:
                return self._ask(question)
            except (ConnectionClosedError, BusyError, UsageError) as error:
                broke = broke or (question.begun and isinstance(error, ConnectionClosedError)) or _is_full(error)
                if not broke or question.given_up or time.monotonic() > until or not is_away(error):
                    raise
            time.sleep(_PAUSE)

    def _ask(self, question: Question) -> None:
        with self._verified() as channel:
            if not question.over(channel):
                return
            left = max(question.until - time.monotonic(), 1e-3)
            fields = {**question.fields, "job": self.job.digest, "wait": left}
            # A part for each token, one for the rest, and the counts.
            parts = channel.stream(fields, question.payload, timeout=left + 5, most=question.longest + 2)
            question.take(parts)

    async def complete(self, question: Question) -> None:
        """Have a question answered, in its turn; one that is given up is no longer computed. Raises Refusal."""
        if self._giving_up:
            raise _ends()
        question.until = time.monotonic() + self._seconds
        deadline = asyncio.timeout(self._seconds)
        try:
            async with deadline:
                self._deadlines.add(deadline)
                await self._complete(question)
        except TimeoutError:
            if self._giving_up:
                raise _ends() from None
            raise Refusal.late() from None
        finally:
            self._deadlines.discard(deadline)

    async def _complete(self, question: Question) -> None:
        if self._waiting >= ServerLimits.max_queue:
            raise Refusal.full(self._waiting, retry_after=5)
        self._waiting += 1
        try:
            await self._places.acquire()
        finally:  # a client that leaves while it waits waits no more
            self._waiting -= 1
        self._running += 1
        work = in_thread(lambda: self.ask(question))
        work.add_done_callback(self._release)
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            question.give_up()
            raise
        except NoCompletionError:
            raise Refusal(502, "the enclave's reply is no completion", code="bad_gateway") from None
        except ObfuscatuneError as error:
            raise _refusal(error) from None

    def _release(self, work: "asyncio.Future[Any]") -> None:
        self._running -= 1
        self._places.release()
        if not work.cancelled():
            work.exception()  # seen, where nobody waits for it any more

    def load(self) -> tuple[int, int]:
        """Return how many requests wait, and how many the enclave has."""
        return self._waiting, self._running

    async def progress(self) -> dict[str, Any]:
        """Return what the enclave tells of the job: status, steps, queries; raises Refusal.

        Whoever asks while an answer is awaited gets the same one: an enclave that stalls holds one thread, not many.
        """
        if self._poll is None or self._poll.done():
            self._poll = in_thread(self.status)
        try:
            told = await asyncio.shield(self._poll)
        except ObfuscatuneError as error:
            raise _refusal(error) from None
        counts = {name: told.get(name) for name in ("step", "steps", "queries")}
        status = told.get("status")
        fits = all(value is None or (type(value) is int and 0 <= value < _MOST) for value in counts.values())
        if not fits or not isinstance(status, str) or len(status) > _MOST_LETTERS:
            raise Refusal(502, "the enclave's reply is no status of a job", code="bad_gateway")
        return {"status": printable(status), **counts, "max_queries": self.job.max_queries}

    def about(self) -> dict[str, Any]:
        """Return what the page shows: what was verified, when, and what the profile of the job hides."""
        with self._lock:
            verdict, judged = self._verdict, self._judged
        attested = {
            "summary": verdict.summary,
            "simulation": verdict.simulation,
            "age": max(0, int(time.time() - judged)),
            "rules": [vars(rule) for rule in verdict.rules],
            "measurements": dict(verdict.measurements),
            "enclave": verdict.require().identity.fingerprint,
        }
        profile = resolve(self.job.profile, **self.job.switches)
        workers = [printable(worker.operator) for worker in self.job.workers] or ["the enclave's operator's"]
        about = describe(profile)
        return {
            **about,
            "shown": [*about["shown"], ON_THE_WAY],
            "workers": workers if profile.remote else [],
            "models": list(self.names),
            "default": self.names[0],
            "attested": attested,
            "chat": True,
        }

    def _renew(self) -> None:
        looked = time.monotonic()
        while not self._ended.wait(min(AWAY_SECONDS, RENEWAL_SECONDS)) and self.fault is None:
            if not self._away and time.monotonic() - looked < RENEWAL_SECONDS:
                continue
            looked = time.monotonic()
            try:
                self.status()
            except (AttestationError, RollbackError):
                return
            except ObfuscatuneError:
                continue  # not there for now: each request verifies for itself


def _is_full(error: ObfuscatuneError) -> bool:
    """Whether this party has as many queries in the enclave as it may; over the channel all of a text is its `what`."""
    return isinstance(error, BusyError) and error.what.startswith(TOO_MANY)


def is_away(error: ObfuscatuneError) -> bool:
    """Whether an enclave cannot be reached for now."""
    return isinstance(error, ConnectionClosedError | BusyError) or error.what == "no enclave answers"


def _refusal(error: ObfuscatuneError) -> Refusal:
    """What a local client is told; the enclave's own words, which are this party's to hear."""
    text = str(error).replace("\n", "; ").replace('"', "'")
    if isinstance(error, AttestationError | RollbackError):
        return Refusal(503, f"the enclave is not the one that was verified: {text}", code="attestation")
    if isinstance(error, ConsentError):
        return Refusal(403, text, code="consent")
    if isinstance(error, ProtocolError) and not is_away(error):
        return Refusal(502, text, code="bad_gateway")
    if isinstance(error, UsageError) and not is_away(error):
        is_long = text.startswith(TOO_LONG)
        return Refusal(400, text, code="context_length_exceeded" if is_long else "invalid_value")
    return Refusal(503, text, code="unavailable", retry_after=5)


def _ends() -> Refusal:
    return Refusal(503, "the server ends", code="unavailable", retry_after=10)
