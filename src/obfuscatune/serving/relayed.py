"""OpenAI's interface on a user's machine to a model in an attested enclave: what ``obfuscatune connect`` offers."""

import asyncio
import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers.cli.serving.utils import _StreamError

from obfuscatune.serving.generation import Manager
from obfuscatune.serving.handlers import ChatHandler, Offer, TextHandler
from obfuscatune.serving.limits import ServerLimits
from obfuscatune.serving.metrics import Metrics
from obfuscatune.serving.question import Question
from obfuscatune.serving.refusal import Refusal
from obfuscatune.serving.relay import Enclave
from obfuscatune.serving.sampling import Settings
from obfuscatune.serving.seeds import Drawn


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

    def __init__(self, enclave: Enclave, metrics: Metrics, longest: int, field: str) -> None:
        self._enclave, self._metrics, self._longest, self._field = enclave, metrics, longest, field
        self._failure: Refusal | None = None
        self._task: asyncio.Task[None] | None = None
        self._question: Question | None = None
        self._started = time.monotonic()
        self._first: float | None = None
        self._heard = asyncio.Event()  # of a stream: its first piece, or its end

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

        def put(item: Any) -> None:
            queue.put_nowait(item)
            self._heard.set()

        def show(piece: str) -> None:
            self._first = self._first or time.monotonic() - self._started
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever waited
                loop.call_soon_threadsafe(lambda: put(piece))  # no arguments, which asyncio might log

        async def run() -> None:
            try:
                await self._ask(prompt, settings, show)
                put(None)
            except asyncio.CancelledError:
                raise
            except BaseException as error:  # whatever it is, a panic of Rust too: the stream's reader must hear its end
                self._failure = error if isinstance(error, Refusal) else Refusal.internal()
                put(_StreamError(self._failure.message))

        self._task = asyncio.ensure_future(run())
        return queue, self

    async def begin(self) -> None:
        """Wait for the first piece of a stream, or its end; raises Refusal, where it has failed before any piece."""
        await self._heard.wait()
        if self._failure is not None and self._first is None:
            raise self._failure

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
            if isinstance(error, Refusal) and error.code == "context_length_exceeded":
                error.param = self._field  # the enclave does not know what the client calls it
            raise
        if drawn is not None:
            drawn.state = "answered"
        settings.stopped = question.ended
        if not question.ended:  # at its longest, of which the enclave knows what the context has left
            settings.longest = question.tokens
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


def offer(enclave: Enclave, limits: ServerLimits, metrics: Metrics) -> Offer:
    """Return the offer of a model in an enclave."""

    def relayed(name: str, field: str) -> Manager:
        return Relayed(enclave, metrics, enclave.job.max_new_tokens, field)

    chat = ChatHandler(enclave, limits, Prompts(), relayed)
    text = TextHandler(enclave, limits, Prompts(), relayed)
    return Offer(enclave.names, chat, text, enclave.about, lambda: enclave.alive, enclave.load, enclave.progress)
