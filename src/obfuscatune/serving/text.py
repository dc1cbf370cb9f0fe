"""The text of one completion as its tokens come: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class Text:
    """What may be shown of a completion so far. Secret: the client's.

    A character may be several tokens, and a text that could be the beginning of a stop string is held back until the
    next token decides. All pieces together are what the tokenizer makes of all tokens, up to the first stop string.

    Args:
        tokenizer: a fast one. stops: texts that end the completion; they are not part of it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._stream = DecodeStream([], skip_special_tokens=True)
        self._tokens: list[int] = []
        self._sent = 0
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token and return what can be shown that was not shown before; sets ``stopped`` at a stop string."""
        self._tokens.append(token)
        piece = self._stream.step(self._tokenizer._tokenizer, token)
        return self._show(piece or "", final=False)

    def end(self) -> str:
        """Return the rest: what was held back, and characters whose last tokens never came."""
        rest = ""
        if not self.stopped:
            whole: str = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
            rest = whole[len(self.text) :] if whole.startswith(self.text) else ""
        return self._show(rest, final=True)

    def _show(self, piece: str, *, final: bool) -> str:
        if not self.stopped and piece:
            self.text += piece
            found = [place for place in map(self.text.find, self._stops) if place >= 0]
            if found:
                self.text, self.stopped = self.text[: min(found)], True
        end = len(self.text) if final or self.stopped else len(self.text) - self._undecided()
        shown = self.text[self._sent : end]
        self._sent = max(self._sent, end)
        return shown

    def _undecided(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        longest = min(len(self.text), max(map(len, self._stops), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self._stops):
                return length
        return 0
