"""transformers' handlers of OpenAI's protocol, over our batches.

``ChatCompletionHandler`` and ``CompletionHandler`` take a request apart, and build each reply and chunk out of the
``openai`` package's own types. What they ask for a model, for tokens and for generation is given here.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fastapi.responses import Response, StreamingResponse
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.utils import Modality

from obfuscatune.serving import request
from obfuscatune.serving.batcher import Batcher
from obfuscatune.serving.chunks import Stream, event
from obfuscatune.serving.claims import describe
from obfuscatune.serving.generation import Generation, Manager, Ready
from obfuscatune.serving.limits import ServerLimits
from obfuscatune.serving.metrics import Metrics
from obfuscatune.serving.models import Defaults, ServedModel
from obfuscatune.serving.prompts import Prompts
from obfuscatune.serving.refusal import Refusal
from obfuscatune.serving.sampling import Settings

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


class _Ours:
    """What both handlers have in common: the collaborators that they ask, and a stream that ends as OpenAI's does."""

    kind = field = ""

    def __init__(
        self, served: Served, limits: ServerLimits, prompts: Any, generation: Callable[[str, str], Manager]
    ) -> None:
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
        if isinstance(response, Stream):
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
        return event(content)

    def _streaming(self, *args: Any, gen_manager: Manager, **more: Any) -> StreamingResponse:
        response: StreamingResponse = super()._streaming(*args, gen_manager=gen_manager, **more)  # type: ignore[misc]
        settings: Settings = args[5]
        return Stream(response.body_iterator, gen_manager, settings.usage)


class ChatHandler(_Ours, ChatCompletionHandler):  # type: ignore[misc]
    """``/v1/chat/completions``."""

    kind, field = "chat", "messages"


class TextHandler(_Ours, CompletionHandler):  # type: ignore[misc]
    """``/v1/completions``."""

    kind, field = "completion", "prompt"

    def _streaming(self, *args: Any, **more: Any) -> StreamingResponse:
        *others, manager, suffix = args  # this handler passes all by position
        return super()._streaming(*others, gen_manager=manager, suffix=suffix)


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


def offer(served: ServedModel, batcher: Batcher, limits: ServerLimits, metrics: Metrics) -> Offer:
    """Return the offer of a model in this process."""

    def generation(name: str, field: str) -> Manager:
        return Generation(served, batcher, limits, metrics, name, field)

    def about() -> dict[str, Any]:
        workers = [link.session.worker for link in served.protected.links]
        more = {"workers": workers, "models": list(served.names), "default": served.names[-1], "attested": None}
        about = describe(served.protected.profile)
        about["shown"] += served.protected.warnings()
        return {**about, **more, "chat": bool(served.tokenizer.chat_template)}

    prompts = Prompts(served.tokenizer)
    chat = ChatHandler(served, limits, prompts, generation)
    text = TextHandler(served, limits, prompts, generation)
    return Offer(served.names, chat, text, about, lambda: batcher.alive, batcher.load)
