"""One request while it is computed: its tokens so far, and the event loop that waits for them."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from transformers.cli.serving.utils import _StreamError

from obfuscatune.serving.refusal import Refusal
from obfuscatune.serving.sampling import Settings
from obfuscatune.serving.text import Text


class Going(Protocol):
    """A row of a batch, as :func:`most_steps` needs it."""

    prompt: list[int]
    tokens: list[int]

    @property
    def left(self) -> int:
        """How many tokens may still come."""


def most_steps(rows: Sequence[Going], positions: int | None) -> int:
    """Return how many steps a round of these rows has at most. positions: of the model, None where it has no limit.

    A row that is done goes through the model until its round ends, and must not leave the model's context meanwhile.
    """
    most = max(row.left for row in rows)
    return most if positions is None else min(most, *(positions - len(row.prompt) - len(row.tokens) for row in rows))


class Row:
    """A request under way. Made and awaited in the event loop, computed in the batcher's thread.

    Attributes:
        adapter: which model it is for. prompt, tokens: ids, secret. settings: how tokens are chosen.
        queue: what transformers' handlers read: pieces of text, then None, or an error.
        failure: why it failed, once it has. done: nothing more will come.
    """

    def __init__(
        self, adapter: str, prompt: list[int], settings: Settings, text: Text, *, seconds: float, streaming: bool
    ) -> None:
        self.adapter, self.prompt, self.settings = adapter, prompt, settings
        self.tokens: list[int] = []
        self.chooser = settings.chooser()
        self.failure: Refusal | None = None
        self.done = self.alone = self.cancelled = False
        self.started = settings.begun
        self.first_token: float | None = None
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        self._deadline = self.started + seconds
        self._text, self._streaming = text, streaming
        self._loop = asyncio.get_running_loop()
        self._ending = threading.Lock()
        # The batcher looks between two steps only, and one for which a worker does not answer may take minutes.
        left = max(0.0, self._deadline - time.monotonic())
        self._timer = self._loop.call_later(left, lambda: self.fail(Refusal.late()))

    @property
    def total_tokens(self) -> int:
        """How many tokens the completion has; an end-of-text token is none of them."""
        return len(self.tokens)

    @property
    def text(self) -> str:
        """The completion so far."""
        return self._text.text

    @property
    def left(self) -> int:
        """How many tokens may still come."""
        return self.settings.longest - len(self.tokens)

    def age(self) -> float:
        """Return the seconds since the request came."""
        return time.monotonic() - self.started

    def cancel(self) -> None:
        """Nobody waits any more; it is dropped at the next token. From any thread."""
        self.cancelled = True
        self._call(self._timer.cancel)

    def take(self, token: int, ends: frozenset[int]) -> None:
        """Add the next token; ``ends`` are those that end a completion."""
        if self.first_token is None:
            self.first_token = time.monotonic()
        if token in ends:
            self.settings.stopped = True
            return self.finish()
        self.tokens.append(token)
        self._send(self._text.push(token))
        if self._text.stopped or self.left <= 0:
            self.finish()
        return None

    def lapse(self) -> bool:
        """End it if nobody waits or its time is over, and return whether it is done."""
        if not self.done and self.cancelled:
            self.done = True
        if not self.done and time.monotonic() > self._deadline:
            self.fail(Refusal.late())
        return self.done

    def finish(self) -> None:
        """It is complete."""
        self._send(self._text.end())
        self.settings.stopped = self.settings.stopped or self._text.stopped
        self._end(None, None)

    def fail(self, refusal: Refusal) -> None:
        """It failed; does nothing where it is done. From any thread."""
        self._end(_StreamError(refusal.message), refusal)

    def _send(self, piece: str) -> None:
        if piece and self._streaming:
            self._put(piece)

    def _end(self, last: Any, failure: Refusal | None) -> None:
        with self._ending:
            if self.done:
                return
            self.done, self.failure = True, failure
        self._put(last)
        self._call(self._timer.cancel)

    def _put(self, item: Any) -> None:
        self._call(lambda: self.queue.put_nowait(item))

    def _call(self, function: Callable[[], None]) -> None:
        """Have the event loop call it; without arguments: asyncio's debug mode logs those of a call that takes long."""
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:  # the loop has ended, and with it whoever waited
            self.cancelled = True
