"""A model in an attested enclave, behind OpenAI's interface on its user's machine: ``obfuscatune connect``.

Each request goes over a connection of its own, opened for it: the enclave proves itself anew, by a fresh nonce, before
anything is sent. So evidence is never older than the request, a connection that broke costs nothing, and an enclave
that has changed is met before it hears a word; then the session is over.
"""

import asyncio
import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from transformers.cli.serving.utils import _StreamError

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
from obfuscatune.profiles import resolve
from obfuscatune.serving.claims import describe
from obfuscatune.serving.handlers import ChatHandler, Manager, Offer, TextHandler
from obfuscatune.serving.limits import Limits
from obfuscatune.serving.metrics import Metrics
from obfuscatune.serving.models import NO_FAMILY, Defaults
from obfuscatune.serving.question import NoCompletionError, Question
from obfuscatune.serving.refusal import Refusal
from obfuscatune.serving.sampling import Settings
from obfuscatune.serving.seeds import Drawn, Seeds

RENEWAL_SECONDS = 60.0
AWAY_SECONDS = 5.0  # until an enclave is looked for again that was not there
POLL_SECONDS = 15.0  # for a reply that needs no computing
CLOSE_SECONDS = 1.0  # that a renewal under way is waited for at the end
AGAIN_SECONDS = 60.0  # for which a question is asked again whose connection broke
_PAUSE = 0.5  # seconds before that
PARALLEL = 4  # queries of one party that an enclave takes at a time
_MOST = 1 << 53  # that an enclave counts
_MOST_LETTERS = 64  # of the name of a job's status

Result = TypeVar("Result")


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

        The enclave knows a question that is asked again, and counts it once. Raises what it says, and AttestationError.
        """
        until, broke = time.monotonic() + AGAIN_SECONDS, False
        while True:
            try:
                return self._ask(question)
            except (ConnectionClosedError, BusyError, UsageError) as error:
                broke = broke or (isinstance(error, ConnectionClosedError) and question.begun)
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
            raise Refusal(504, "the time of the request is over", code="timeout") from None
        finally:
            self._deadlines.discard(deadline)

    async def _complete(self, question: Question) -> None:
        if self._waiting >= Limits.max_queue:
            raise Refusal(429, f"{self._waiting} requests wait already", code="queue_full", retry_after=5)
        self._waiting += 1
        try:
            await self._places.acquire()
        finally:  # a client that leaves while it waits waits no more
            self._waiting -= 1
        self._running += 1
        work = _in_thread(lambda: self.ask(question))
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
            self._poll = _in_thread(self.status)
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
            "age": int(time.time() - judged),
            "rules": [vars(rule) for rule in verdict.rules],
            "measurements": dict(verdict.measurements),
            "enclave": verdict.require().identity.fingerprint,
        }
        workers = [printable(worker.operator) for worker in self.job.workers] or ["the enclave's operator's"]
        more = {"workers": workers, "models": list(self.names), "default": self.names[0]}
        return {**describe(resolve(self.job.profile, **self.job.switches)), **more, "attested": attested, "chat": True}

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


class Prompts:
    """Hands texts and messages on: tokens are made in the enclave."""

    def text(self, text: str) -> list[str]:
        """Return the text in place of its tokens."""
        return [text]

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
        """Return the messages in place of their tokens."""
        # OpenAI's newer name of a system's role; the enclave knows the older one.
        roles = ({"developer": "system"}.get(message["role"], message["role"]) for message in messages)
        pairs = zip(roles, messages, strict=True)
        return [{"role": role, "content": message["content"]} for role, message in pairs]


class Relayed(Manager):
    """One request to an enclave."""

    def __init__(self, enclave: Enclave, metrics: Metrics, longest: int) -> None:
        self._enclave, self._metrics, self._longest = enclave, metrics, longest
        self._failure: Refusal | None = None
        self._task: asyncio.Task[None] | None = None
        self._question: Question | None = None
        self._started = time.monotonic()
        self._first: float | None = None

    @property
    def failure(self) -> Refusal | None:
        """Why the request failed, once it has."""
        return self._failure

    @property
    def total_tokens(self) -> int:
        """How many tokens the completion has so far."""
        return 0 if self._question is None else self._question.tokens

    @property
    def prompt_tokens(self) -> int | None:
        """How many tokens the prompt has, once the enclave has told."""
        return None if self._question is None else self._question.prompt_tokens

    def stream(self, prompt: Any, settings: Settings) -> tuple["asyncio.Queue[Any]", "Relayed"]:
        """Return the queue of pieces, and this, which counts them."""
        queue: asyncio.Queue[Any] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def show(piece: str) -> None:
            self._first = self._first or time.monotonic() - self._started
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever waited
                loop.call_soon_threadsafe(queue.put_nowait, piece)

        async def run() -> None:
            try:
                await self._ask(prompt, settings, show)
                queue.put_nowait(None)
            except asyncio.CancelledError:
                raise
            except BaseException as error:  # whatever it is, a panic of Rust too: the stream's reader must hear its end
                self._failure = error if isinstance(error, Refusal) else Refusal.internal()
                queue.put_nowait(_StreamError(self._failure.message))

        self._task = asyncio.ensure_future(run())
        return queue, self

    async def complete(self, prompt: Any, settings: Settings) -> tuple[str, int, list[int]]:
        """Return text, count of the prompt's tokens, and as many tokens as the answer has; raises Refusal."""
        question = await self._ask(prompt, settings, None)
        return question.text, question.prompt_tokens, [0] * question.tokens

    def cancel(self) -> None:
        """Nobody waits any more. The enclave computes no more of it, and has counted it."""
        if self._task is not None:
            self._task.cancel()

    end = cancel

    async def _ask(self, prompt: Any, settings: Settings, show: Callable[[str], None] | None) -> Question:
        # What the job allows at most; the enclave refuses more.
        settings.longest = min(settings.longest, self._longest)
        if len(prompt) == 1 and isinstance(prompt[0], str):  # a text, not messages
            prompt = prompt[0]
        drawn = self._draw(prompt, settings)
        chosen = settings if drawn is None else replace(settings, seed=drawn.value)
        question = self._question = Question(prompt, chosen, show)
        try:
            await self._enclave.complete(question)
        except BaseException as error:
            if drawn is not None:
                drawn.state = "failed"
            if isinstance(error, asyncio.CancelledError):
                self._metrics.completed(question.prompt_tokens, self._age(), self._first, cancelled=True)
            raise
        if drawn is not None:
            drawn.state = "answered"
        settings.stopped = question.ended
        self._metrics.generated(question.tokens)
        self._metrics.completed(question.prompt_tokens, self._age(), self._first, cancelled=False)
        return question

    def _draw(self, prompt: Any, settings: Settings) -> Drawn | None:
        """Return a seed for a request that wants one and has none."""
        if settings.temperature == 0 or settings.seed is not None:
            return None
        asked = [prompt, settings.longest, settings.temperature, settings.top_p, settings.stop]
        return self._enclave.seeds.take(hashlib.sha256(json.dumps(asked).encode()).digest(), again=settings.again)

    def _age(self) -> float:
        return time.monotonic() - self._started


def offer(enclave: Enclave, limits: Limits, metrics: Metrics) -> Offer:
    """Return the offer of a model in an enclave."""

    def relayed(name: str, field: str) -> Manager:
        return Relayed(enclave, metrics, enclave.job.max_new_tokens)

    chat = ChatHandler(enclave, limits, Prompts(), relayed)
    text = TextHandler(enclave, limits, Prompts(), relayed)
    return Offer(enclave.names, chat, text, enclave.about, lambda: enclave.alive, enclave.load, enclave.progress)


def _in_thread(work: Callable[[], Result]) -> "asyncio.Future[Result]":
    """Return what a thread of its own will return; one that stalls keeps neither another one nor the process's end."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def settle(result: Result | None, error: BaseException | None) -> None:
        if not future.cancelled():
            future.set_result(result) if error is None else future.set_exception(error)  # type: ignore[arg-type]

    def run() -> None:
        result, failed = None, None
        try:
            result = work()
        except BaseException as error:  # whatever it is, whoever waits must hear of it
            failed = error
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever waited
            loop.call_soon_threadsafe(settle, result, failed)

    threading.Thread(target=run, name="asking", daemon=True).start()
    return future


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
        return Refusal(400, text, code="invalid_value")
    return Refusal(503, text, code="unavailable", retry_after=5)


def _ends() -> Refusal:
    return Refusal(503, "the server ends", code="unavailable", retry_after=10)
