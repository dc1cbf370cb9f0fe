"""A prompt that an enclave elsewhere is asked, and its answer in parts, which may be asked for again."""

import codecs
import json
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

from obfuscatune.errors import ObfuscatuneError
from obfuscatune.parties.channel.client import AttestedChannel
from obfuscatune.serving.sampling import Settings

_MOST_TOKENS = 1 << 53  # of a prompt
_MOST_CHARACTERS = 1 << 10  # of one token


class NoCompletionError(ObfuscatuneError):
    """The enclave has said something else."""


class Question:
    """A prompt on its way to the enclave, and what has come back of its answer.

    Args:
        prompt: a text or messages. settings: how it is completed; those that sample have a seed, by which the enclave
            gives the same answer however often it is asked. show: called with each piece of the text, from the thread
            that asks; None: the answer is wanted whole.

    Attributes:
        text, prompt_tokens, tokens, ended: of the answer so far. until: when nobody waits any more, by the clock.
    """

    def __init__(self, prompt: Any, settings: Settings, show: Callable[[str], None] | None) -> None:
        self.longest = settings.longest
        sampling: dict[str, Any] = {"stop": list(settings.stop)} if settings.stop else {}
        if settings.temperature > 0:
            sampling |= {"temperature": settings.temperature, "top_p": settings.top_p, "seed": settings.seed}
        self.fields = {"op": "generate", "max_new_tokens": self.longest, "sampling": sampling, "stream": 1}
        self.payload = json.dumps([prompt]).encode()
        self.text, self.prompt_tokens, self.tokens, self.ended = "", 0, 0, False
        self.begun = self.given_up = False
        self.until = math.inf
        self._show = show
        self._lock = threading.Lock()
        self._channel: AttestedChannel | None = None

    def over(self, channel: AttestedChannel) -> bool:
        """Return whether it may still be asked, now over this channel."""
        with self._lock:
            self._channel, self.begun = channel, True
            return not self.given_up

    def give_up(self) -> None:
        """Nobody waits any more: the channel is closed, by which the enclave learns it."""
        with self._lock:
            self.given_up = True
            if self._channel is not None:
                self._channel.close()

    def take(self, parts: Iterator[tuple[dict[str, Any], bytes]]) -> None:
        """Take an answer from its beginning, and show what was not shown yet.

        Raises:
            NoCompletionError: it is none, or goes on otherwise than before. Whatever the iteration raises.
        """
        counts, at, decoder = dict[str, Any](), 0, codecs.getincrementaldecoder("utf-8")()
        for counts, data in parts:
            try:
                piece = decoder.decode(data)
            except UnicodeDecodeError:
                raise NoCompletionError("no text") from None
            known = self.text[at : at + len(piece)]
            at += len(piece)
            if not piece.startswith(known) or at > _MOST_CHARACTERS * (self.longest + 1):
                raise NoCompletionError("another text")
            self._give(piece[len(known) :])
            tokens = counts.get("tokens")
            if type(tokens) is int and self.tokens <= tokens <= self.longest:
                self.tokens = tokens
        if at < len(self.text):
            raise NoCompletionError("another text")
        try:
            one = [counts[name][0] for name in ("prompt_tokens", "completion_tokens", "ended")]
        except (LookupError, TypeError):
            raise NoCompletionError("no counts") from None
        if not all(type(n) is int for n in one) or not (0 <= one[0] < _MOST_TOKENS and 0 <= one[1] <= self.longest):
            raise NoCompletionError("no counts")
        self.prompt_tokens, self.tokens, self.ended = one[0], one[1], bool(one[2])

    def _give(self, piece: str) -> None:
        self.text += piece
        if piece and self._show is not None:
            self._show(piece)
