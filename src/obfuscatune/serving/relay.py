"""A model in an attested enclave, behind OpenAI's interface on its user's machine: ``obfuscatune connect``.

Each request goes over a connection of its own, opened for it: the enclave proves itself anew, by a fresh nonce, before
anything is sent. So evidence is never older than the request, a connection that broke costs nothing, and an enclave
that has changed is met before it hears a word; then the session is over.
"""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers.cli.serving.utils import _StreamError

from obfuscatune.errors import (
    AttestationError,
    ConsentError,
    ObfuscatuneError,
    ProtocolError,
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
from obfuscatune.serving.refusal import Refusal
from obfuscatune.serving.sampling import Settings

RENEWAL_SECONDS = 60.0
_MOST_TOKENS = 1 << 53
PARALLEL = 4  # queries of one party that an enclave takes at a time


class Enclave:
    """The enclave of a job, asked over attested channels.

    Args:
        connect: opens a channel if the policy accepts the enclave and it has the pinned identity. first: the one that
            was judged before anything was served. seconds: for a reply.

    Attributes:
        names: of its one model. fault: why the session is over.
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
        self._running = self._waiting = 0
        self._places = asyncio.Semaphore(PARALLEL)
        self._on_fault: Callable[[], None] = lambda: None
        self._ended = threading.Event()
        self._renewing = threading.Thread(target=self._renew, name="renewal", daemon=True)

    def start(self, on_fault: Callable[[], None]) -> None:
        """Judge the enclave again from time to time. on_fault: called once, when the session is over."""
        self._on_fault = on_fault
        self._renewing.start()

    def close(self) -> None:
        """Judge it no more."""
        self._ended.set()
        if self._renewing.ident is not None:
            self._renewing.join()

    def request(self, fields: Mapping[str, Any], payload: bytes = b"") -> tuple[dict[str, Any], bytes]:
        """Verify the enclave, and ask it; raises what it says, and AttestationError, which ends the session."""
        if self.fault is not None:
            raise self.fault
        try:
            with self._connect() as channel:
                with self._lock:
                    self._verdict, self._judged = channel.verdict, time.time()
                return channel.request({**fields, "job": self.job.digest}, payload, timeout=self._seconds)
        except AttestationError as error:
            self.fault = error
            self._on_fault()
            raise

    async def complete(self, prompt: Any, longest: int) -> tuple[str, int, int, bool]:
        """Return text, tokens of prompt and completion, and whether it ended by itself; raises Refusal."""
        fields = {"op": "generate", "max_new_tokens": longest, "wait": self._seconds}
        if self._waiting >= Limits.max_queue:
            raise Refusal(429, f"{self._waiting} requests wait already", code="queue_full", retry_after=5)
        self._waiting += 1
        try:
            await self._places.acquire()
        finally:  # a client that leaves while it waits waits no more
            self._waiting -= 1
        self._running += 1
        # The thread goes on where the client leaves, and has the place until the enclave has answered.
        work = asyncio.ensure_future(asyncio.to_thread(self.request, fields, json.dumps([prompt]).encode()))
        work.add_done_callback(self._release)
        try:
            counts, payload = await asyncio.shield(work)
            texts = json.loads(payload)
            one = [counts[name][0] for name in ("prompt_tokens", "completion_tokens", "ended")]
            if not (isinstance(texts, list) and isinstance(texts[0], str) and all(type(n) is int for n in one)):
                raise TypeError
            if not (0 <= one[0] < _MOST_TOKENS and 0 <= one[1] <= longest):
                raise ValueError
            return texts[0], one[0], one[1], bool(one[2])
        except ObfuscatuneError as error:
            raise _refusal(error) from None
        except (ValueError, LookupError, TypeError, RecursionError):
            raise Refusal(502, "the enclave's reply is no completion", code="bad_gateway") from None

    def _release(self, work: "asyncio.Future[Any]") -> None:
        self._running -= 1
        self._places.release()
        if not work.cancelled():
            work.exception()  # seen, where nobody waits for it any more

    def load(self) -> tuple[int, int]:
        """Return how many requests wait, and how many the enclave has."""
        return self._waiting, self._running

    def progress(self) -> dict[str, Any]:
        """Return what the enclave tells of the job: status, steps, queries; raises Refusal."""
        try:
            told, _ = self.request({"op": "status"})
        except ObfuscatuneError as error:
            raise _refusal(error) from None
        names = ("status", "step", "steps", "queries")
        return {**{name: told.get(name) for name in names}, "max_queries": self.job.max_queries}

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
        while not self._ended.wait(RENEWAL_SECONDS) and self.fault is None:
            try:
                self.request({"op": "status"})
            except AttestationError:
                return
            except ObfuscatuneError:
                continue  # not there for now: each request verifies for itself


class Prompts:
    """Hands texts and messages on: tokens are made in the enclave."""

    def __call__(self, text: str, **more: Any) -> dict[str, Any]:
        """Return the text in place of its tokens."""
        return {"input_ids": [text]}

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], **more: Any) -> dict[str, Any]:
        """Return the messages in place of their tokens."""
        # OpenAI's newer name of a system's role; the enclave knows the older one.
        roles = ({"developer": "system"}.get(message["role"], message["role"]) for message in messages)
        pairs = zip(roles, messages, strict=True)
        return {"input_ids": [{"role": role, "content": message["content"]} for role, message in pairs]}


class Relayed(Manager):
    """One request to an enclave. Its answer comes whole, so a stream of it has one piece."""

    def __init__(self, enclave: Enclave, metrics: Metrics, longest: int) -> None:
        self._enclave, self._metrics, self._longest = enclave, metrics, longest
        self._failure: Refusal | None = None
        self._task: asyncio.Task[None] | None = None
        self._started = time.monotonic()
        self.total_tokens = self._prompt_tokens = 0

    @property
    def failure(self) -> Refusal | None:
        """Why the request failed, once it has."""
        return self._failure

    def stream(self, prompt: Any, settings: Settings) -> tuple["asyncio.Queue[Any]", "Relayed"]:
        """Return the queue of pieces, and this, which counts them."""
        queue: asyncio.Queue[Any] = asyncio.Queue()

        async def run() -> None:
            try:
                queue.put_nowait(await self._ask(prompt, settings))
                queue.put_nowait(None)
            except Exception as error:  # whatever it is, whoever reads the stream must hear its end
                self._failure = error if isinstance(error, Refusal) else Refusal.internal()
                queue.put_nowait(_StreamError(self._failure.message))

        _check(settings)
        self._task = asyncio.ensure_future(run())
        return queue, self

    async def complete(self, prompt: Any, settings: Settings) -> tuple[str, int, list[int]]:
        """Return text, count of the prompt's tokens, and as many tokens as the answer has; raises Refusal."""
        _check(settings)
        text = await self._ask(prompt, settings)
        return text, self._prompt_tokens, [0] * self.total_tokens

    def cancel(self) -> None:
        """Nobody waits any more. What the enclave has begun it finishes, and has counted."""
        if self._task is not None:
            self._task.cancel()

    end = cancel

    async def _ask(self, prompt: Any, settings: Settings) -> str:
        # What the job allows at most; the enclave refuses more.
        settings.longest = min(settings.longest, self._longest)
        if len(prompt) == 1 and isinstance(prompt[0], str):  # a text, not messages
            prompt = prompt[0]
        text, self._prompt_tokens, self.total_tokens, ended = await self._enclave.complete(prompt, settings.longest)
        places = [place for place in map(text.find, settings.stop) if place >= 0]
        settings.stopped = ended or bool(places)
        self._metrics.generated(self.total_tokens)
        self._metrics.completed(self._prompt_tokens, time.monotonic() - self._started, None, cancelled=False)
        return text[: min(places)] if places else text


def offer(enclave: Enclave, limits: Limits, metrics: Metrics) -> Offer:
    """Return the offer of a model in an enclave."""

    def relayed(name: str) -> Manager:
        return Relayed(enclave, metrics, enclave.job.max_new_tokens)

    chat = ChatHandler(enclave, limits, Prompts(), relayed)
    text = TextHandler(enclave, limits, Prompts(), relayed)
    return Offer(
        enclave.names, chat, text, enclave.about, lambda: enclave.fault is None, enclave.load, enclave.progress
    )


def _check(settings: Settings) -> None:
    if settings.temperature > 0:
        message = "an enclave completes greedily: temperature has to be 0 or left out"
        raise Refusal(400, message, code="unsupported_parameter", param="temperature")


def _refusal(error: ObfuscatuneError) -> Refusal:
    """What a local client is told; the enclave's own words, which are this party's to hear."""
    text = str(error).replace("\n", "; ").replace('"', "'")
    if isinstance(error, AttestationError):
        return Refusal(503, f"the enclave is not the one that was verified: {text}", code="attestation")
    if isinstance(error, ConsentError):
        return Refusal(403, text, code="consent")
    if isinstance(error, ProtocolError):
        return Refusal(502, text, code="bad_gateway")
    if isinstance(error, UsageError):
        return Refusal(400, text, code="invalid_value")
    return Refusal(503, text, code="unavailable", retry_after=5)
