"""transformers' handlers of OpenAI's protocol, over our batches.

``ChatCompletionHandler`` and ``CompletionHandler`` take a request apart, and build each reply and chunk out of the
``openai`` package's own types. What they ask for a model, for tokens and for generation is given here.
"""

import asyncio
import json
import threading
import time
from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fastapi.responses import Response, StreamingResponse
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.utils import BaseGenerateManager, Modality

from obfuscatune.errors import UsageError
from obfuscatune.serving import request
from obfuscatune.serving.batcher import Batcher
from obfuscatune.serving.claims import describe
from obfuscatune.serving.limits import Limits
from obfuscatune.serving.metrics import Metrics
from obfuscatune.serving.models import Defaults, ServedModel
from obfuscatune.serving.refusal import Refusal
from obfuscatune.serving.row import Row
from obfuscatune.serving.sampling import Settings
from obfuscatune.serving.text import Text
from obfuscatune.training.chat import prompt_tokens, spells_special
from obfuscatune.training.encoding import check_embedded, prompt_text_tokens, vocabulary_of

# What a request's body holds for the handlers beside its fields: names that no request gets through with.
_TOKENS, _SETTINGS = "its tokens", "its settings"


class Served(Protocol):
    """What is served, as the handlers need it."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the models."""

    @property
    def defaults(self) -> Defaults:
        """How tokens are chosen where a request does not say."""


class Prompts:
    """Texts and messages to tokens.

    A message that spells a special token is refused, see `spells_special`. A bare text is the client's own in all its
    parts, and its special tokens are special, as in ``obfuscatune generate``.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # a tokenizer keeps state between calls

    def text(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        with self._lock:
            return prompt_text_tokens(self._tokenizer, text)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the tokens of messages and of the header of the answer; raises Refusal."""
        with self._lock:
            return self._chat(messages)

    def _chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        # OpenAI's newer name of a system's role: a template that knows the older one alone leaves the message out.
        system = "developer" if "developer" in str(self._tokenizer.chat_template) else "system"
        roles = {"developer": system}
        turns = [(roles.get(message["role"], message["role"]), message["content"]) for message in messages]
        number = spells_special(self._tokenizer, turns)
        if number is not None:
            name = f"messages[{number}].content"
            raise Refusal(400, f"{name} spells a special token", code="invalid_value", param=name)
        try:
            return prompt_tokens(self._tokenizer, turns, "messages")
        except UsageError as error:
            text = f"{error.what}; {error.hint}" if error.hint else error.what
        raise Refusal(400, text, code="chat_template", param="messages")


@dataclass(frozen=True, repr=False)  # a repr would show the prompt
class Ready:
    """Stands in for transformers' processor, where the tokens of a request are made already."""

    tokens: Sequence[Any]

    def __call__(self, text: str, **more: Any) -> dict[str, Any]:
        """Return the tokens."""
        return {"input_ids": self.tokens}

    apply_chat_template = __call__


class Manager(BaseGenerateManager):
    """What stands in for transformers' manager of generation, for one request."""

    @property
    def failure(self) -> Refusal | None:
        """Why the request failed, once it has."""
        return None

    @property
    def prompt_tokens(self) -> int | None:
        """How many tokens the prompt has, where transformers' handlers do not see them."""
        return None

    @abstractmethod
    def stream(self, prompt: Any, settings: Settings) -> tuple["asyncio.Queue[Any]", Any]:
        """Return the queue of pieces, and what counts their tokens and can be cancelled; raises Refusal."""

    async def begin(self) -> None:
        """Wait until a stream may begin; raises Refusal, whose status its client can still be told then."""

    @abstractmethod
    async def complete(self, prompt: Any, settings: Settings) -> tuple[str, int, list[int]]:
        """Return text, count of the prompt's tokens, and tokens; raises Refusal."""

    @abstractmethod
    def end(self) -> None:
        """The client has its answer, or has left."""

    # As the handlers call it.

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> Any:
        """See `stream`."""
        return self.stream(inputs["input_ids"], gen_config)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, list[int]]:
        """See `complete`."""
        return await self.complete(inputs["input_ids"], gen_config)

    def stop(self) -> None:
        """Nothing of its own runs."""


class Generation(Manager):
    """One request to a model in this process."""

    def __init__(
        self, served: ServedModel, batcher: Batcher, limits: Limits, metrics: Metrics, name: str, field: str
    ) -> None:
        self._served, self._batcher, self._limits, self._metrics = served, batcher, limits, metrics
        self._name, self._field = name, field
        self._row: Row | None = None
        self._ended = False

    @property
    def failure(self) -> Refusal | None:
        """Why the request failed, once it has."""
        return None if self._row is None else self._row.failure

    def stream(self, prompt: list[int], settings: Settings) -> tuple["asyncio.Queue[Any]", Row]:
        """Return the queue of pieces, and the row that feeds it; raises Refusal."""
        row = self._submit(prompt, settings, streaming=True)
        return row.queue, row

    async def complete(self, prompt: list[int], settings: Settings) -> tuple[str, int, list[int]]:
        """Return text, count of the prompt's tokens, and tokens; raises Refusal."""
        row = self._submit(prompt, settings, streaming=False)
        try:
            await row.queue.get()
        finally:
            self.end()
        if row.failure is not None:
            raise row.failure
        return row.text, len(row.prompt), row.tokens

    def end(self) -> None:
        """Count it, and stop it where nobody waits any more; again and again does no harm."""
        row = self._row
        if row is None or self._ended:
            return
        self._ended, left = True, not row.done
        row.cancel()
        first = None if row.first_token is None else row.first_token - row.started
        self._metrics.completed(len(row.prompt), row.age(), first, cancelled=left)

    def _submit(self, prompt: list[int], settings: Settings, *, streaming: bool) -> Row:
        if not prompt:
            raise Refusal(400, "the prompt has no token", code="invalid_value", param=self._field)
        try:
            check_embedded(prompt, vocabulary_of(self._served.model.config), "prompt")
        except UsageError as error:
            raise Refusal(400, error.what, code="invalid_value", param=self._field) from None
        positions = self._served.positions
        if positions is not None:
            if len(prompt) >= positions:
                message = f"the prompt has {len(prompt)} tokens, and the model's context is {positions}"
                raise Refusal(400, message, code="context_length_exceeded", param=self._field)
            settings.longest = min(settings.longest, positions - len(prompt))
        text = Text(self._served.tokenizer, settings.stop)
        row = Row(self._name, prompt, settings, text, seconds=self._limits.seconds, streaming=streaming)
        self._batcher.submit(row)
        self._row = row
        return row


class _Ours:
    """What both handlers have in common: the collaborators that they ask, and a stream that ends as OpenAI's does."""

    kind = field = ""

    def __init__(self, served: Served, limits: Limits, prompts: Any, generation: Callable[[str, str], Manager]) -> None:
        super().__init__(model_manager=self, generation_state=self)  # type: ignore[call-arg]
        self._served, self._limits, self._prompts, self._generation = served, limits, prompts, generation
        self._reading = 0

    async def answer(self, body: dict[str, Any], request_id: str, *, again: bool) -> Response:
        """Answer a request. again: whether it is asked again, as its client says. Raises Refusal.

        Tokens are made in a thread: those of a long prompt take a second, in which the loop has others to serve. Many
        of those are a queue too, with the same limits.
        """
        begun = time.monotonic()
        request.check(body, self.kind, self._served.names)
        asked = request.plain(body, self.kind)
        settings = replace(request.settings(asked, self._served.defaults, self._limits), again=again, begun=begun)
        tokens = await self._tokens(asked[self.field])
        response: Response = await self.handle_request(  # type: ignore[attr-defined]
            {**asked, _TOKENS: tokens, _SETTINGS: settings}, request_id
        )
        if isinstance(response, _Stream):
            await response.begin()
        return response

    async def _tokens(self, content: Any) -> Any:
        if self._reading >= self._limits.max_queue:
            raise Refusal.full(self._reading)
        make = self._prompts.chat if self.kind == "chat" else self._prompts.text
        self._reading += 1
        try:
            async with asyncio.timeout(self._limits.seconds):
                return await asyncio.to_thread(make, content)
        except TimeoutError:
            raise Refusal.late() from None
        finally:
            self._reading -= 1

    # As the handlers' model manager and state of generation.

    def get_model_modality(self, model: Any, processor: Any = None) -> Modality:
        return Modality.LLM

    def use_continuous_batching(self, model: Any, modality: Modality) -> bool:
        return True  # tokens as plain lists, and nothing moved to a device

    def get_manager(self, model_id: str, use_cb: bool = False) -> Manager:
        return self._generation(model_id, self.field)

    # In place of the handlers' own.

    def _validate_request(self, body: dict[str, Any]) -> None:
        pass  # it has been, before its tokens were made

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Served, Any]:
        return body["model"], self._served, Ready(body[_TOKENS])

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **more: Any) -> Settings:
        settings: Settings = body[_SETTINGS]
        return settings

    @staticmethod
    def chunk_to_sse(chunk: Any) -> str:
        """As the handlers' own, which leaves out all that is null; OpenAI's chunks have a `finish_reason` always."""
        content = chunk.model_dump(exclude_none=True)
        for choice in content["choices"]:
            choice.setdefault("finish_reason", None)
        return _event(content)

    def _streaming(self, *args: Any, gen_manager: Manager, **more: Any) -> StreamingResponse:
        response: StreamingResponse = super()._streaming(*args, gen_manager=gen_manager, **more)  # type: ignore[misc]
        settings: Settings = args[5]
        return _Stream(response.body_iterator, gen_manager, settings.usage)


class ChatHandler(_Ours, ChatCompletionHandler):  # type: ignore[misc]
    """``/v1/chat/completions``."""

    kind, field = "chat", "messages"


class TextHandler(_Ours, CompletionHandler):  # type: ignore[misc]
    """``/v1/completions``."""

    kind, field = "completion", "prompt"

    def _streaming(self, *args: Any, **more: Any) -> StreamingResponse:
        *others, manager, suffix = args  # this handler passes all by position
        return super()._streaming(*others, gen_manager=manager, suffix=suffix)


class _Stream(StreamingResponse):
    """The chunks of a handler, ended as OpenAI ends them. usage: whether the counts are asked for."""

    def __init__(self, chunks: Any, manager: Manager, usage: bool) -> None:
        headers = {"Cache-Control": "no-store"}
        super().__init__(_ended(chunks, manager, usage), media_type="text/event-stream", headers=headers)
        self._manager = manager

    async def begin(self) -> None:
        """Wait until it may begin; raises Refusal. Where nothing comes of it, the request is over."""
        try:
            await self._manager.begin()
        except BaseException:  # the client has left, too
            self._manager.end()
            raise


async def _ended(chunks: Any, manager: Manager, usage: bool) -> AsyncIterator[str]:
    """Yield the chunks and OpenAI's end of a stream; a failure as its error object. usage: whether it is asked for."""
    try:
        async for chunk in chunks:
            # The handlers join what has come meanwhile: pieces may be before an error. In a piece quotes are escaped.
            pieces, error, _ = chunk.partition('data: {"error"')
            if '"usage":{' in pieces:  # the last one, alone; in a text its quotation marks are escaped
                pieces = _counted(pieces, manager.prompt_tokens, usage)
            elif usage:
                pieces = pieces.replace("}\n\n", ',"usage":null}\n\n')  # in a text the ends of lines are escaped
            if pieces:
                yield pieces
            if error:
                yield f"data: {json.dumps((manager.failure or Refusal.internal()).body())}\n\n"
                return
        yield "data: [DONE]\n\n"
    finally:
        manager.end()


def _counted(chunk: str, prompt_tokens: int | None, usage: bool) -> str:
    """Return a stream's last chunk without its counts, and behind it, where they are asked for, one of them alone.

    prompt_tokens: where transformers' handlers do not see them.
    """
    content = json.loads(chunk.removeprefix("data: "))
    counts = content.pop("usage")
    if not usage:
        return _event(content)
    if prompt_tokens is not None:
        counts |= {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens + counts["completion_tokens"]}
    return _event({**content, "usage": None}) + _event({**content, "choices": [], "usage": counts})


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, separators=(',', ':'), ensure_ascii=False)}\n\n"


@dataclass(frozen=True)
class Offer:
    """What an application serves: a model in this process, or one in an enclave elsewhere.

    Attributes:
        names: of the models. chat, text: what answers. about: what the page shows. job: of an enclave's job, its
            progress. alive: whether it can be asked. load: how many requests wait, and how many are computed.
    """

    names: tuple[str, ...]
    chat: ChatHandler
    text: TextHandler
    about: Callable[[], dict[str, Any]]
    alive: Callable[[], bool]
    load: Callable[[], tuple[int, int]]
    job: Callable[[], Awaitable[dict[str, Any]]] | None = None


def offer(served: ServedModel, batcher: Batcher, limits: Limits, metrics: Metrics) -> Offer:
    """Return the offer of a model in this process."""

    def generation(name: str, field: str) -> Manager:
        return Generation(served, batcher, limits, metrics, name, field)

    def about() -> dict[str, Any]:
        workers = [link.session.worker for link in served.protected.links]
        more = {"workers": workers, "models": list(served.names), "default": served.names[-1], "attested": None}
        return {**describe(served.protected.profile), **more, "chat": bool(served.tokenizer.chat_template)}

    prompts = Prompts(served.tokenizer)
    chat = ChatHandler(served, limits, prompts, generation)
    text = TextHandler(served, limits, prompts, generation)
    return Offer(served.names, chat, text, about, lambda: batcher.alive, batcher.load)
