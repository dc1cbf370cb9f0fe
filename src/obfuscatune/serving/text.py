"""The text of one completion as its tokens come: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence
from typing import Any

BROKEN = "\ufffd"  # what decoders make of bytes that are no character, or not yet


def decoded(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Return the text of tokens, special ones left out; spaces that a stream may have shown are not cleaned up."""
    text: str = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


class Text:
    """What may be shown of a completion so far. Secret: the client's.

    A character may be several tokens, and a text that could be the beginning of a stop string is held back until the
    next token decides. All pieces together are what the tokenizer's decoder makes of all tokens, up to the first stop
    string, with one exception. Decoders of byte tokens, as of Llama 2, take a whole run of them for broken if its end
    is; a character of that run which was whole, and may have been sent, stays whole here.

    The tokenizers' own ``DecodeStream`` raises there.

    Args:
        tokenizer: a fast one. stops: texts that end the completion; they are not part of it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._tokens: list[int] = []  # the last that made a piece, and those after it
        self._settled = 0  # of these, how many made it
        self._sent = 0
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token and return what can be shown that was not shown before; sets ``stopped`` at a stop string."""
        self._tokens.append(token)
        piece = self._piece()
        if not piece or piece.endswith(BROKEN):
            return self._show("", final=False)
        self._tokens = self._tokens[self._settled :]
        self._settled = len(self._tokens)
        return self._show(piece, final=False)

    def end(self) -> str:
        """Return the rest: what was held back, and characters whose last tokens never came."""
        return self._show("" if self.stopped else self._piece(), final=True)

    def _piece(self) -> str:
        """Return what the tokens since the last piece add to it, broken characters included."""
        before, now = self._decode(self._tokens[: self._settled]), self._decode(self._tokens)
        return now[len(before) :] if now.startswith(before) else self._decode(self._tokens[self._settled :])

    def _decode(self, tokens: list[int]) -> str:
        return decoded(self._tokenizer, tokens)

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
