"""What transformers' handlers ask for the generation of one request, over our batches."""

import asyncio
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.cli.serving.utils import BaseGenerateManager

from obfuscatune.errors import UsageError
from obfuscatune.serving.batcher import Batcher
from obfuscatune.serving.limits import ServerLimits
from obfuscatune.serving.metrics import Metrics
from obfuscatune.serving.models import ServedModel
from obfuscatune.serving.refusal import Refusal
from obfuscatune.serving.row import Row
from obfuscatune.serving.sampling import Settings
from obfuscatune.serving.text import Text
from obfuscatune.training.encoding import check_embedded, vocabulary_of


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
        self, served: ServedModel, batcher: Batcher, limits: ServerLimits, metrics: Metrics, name: str, field: str
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
