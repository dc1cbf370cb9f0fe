"""How the next token of each row of a batch is chosen: every request by its own settings and its own random numbers.

Stock ``generate`` samples all rows alike, from torch's one generator. Here it decodes greedily, and :class:`Choosing`
leaves it one choice in each row that samples. So requests of any settings share a batch, and a seed gives the same
random numbers whoever else is in it.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from obfuscatune.training.finite import check_logits


@dataclass(kw_only=True)
class Settings:
    """How one completion is generated.

    Attributes:
        longest: tokens at most. temperature: 0 takes the likeliest. top_p, top_k: as of transformers; 1 and 0 are off.
        seed: of this request's random numbers; None: the system's. stop: texts that end it.
        stopped: whether it ended by itself rather than at its longest. usage: whether a stream tells its counts.
        again: whether the client says that it has asked this before, and had no answer.
        begun: when the request came, by `time.monotonic`.
    """

    longest: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = field(default=(), repr=False)  # the client's own words
    stopped: bool = False
    usage: bool = False
    again: bool = False
    begun: float = field(default_factory=time.monotonic)

    @property
    def max_new_tokens(self) -> int:
        """What transformers' handlers compare the count of tokens with, to say ``length`` rather than ``stop``."""
        return self.longest + 1 if self.stopped else self.longest

    def chooser(self) -> "Chooser | None":
        """Return what samples, or None for greedy decoding."""
        return Chooser(self) if self.temperature > 0 else None


class Chooser:
    """Samples the tokens of one request."""

    def __init__(self, settings: Settings) -> None:
        self._generator = torch.Generator()
        if settings.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(settings.seed)
        self._warpers = LogitsProcessorList([TemperatureLogitsWarper(settings.temperature)])
        if settings.top_k > 0:
            self._warpers.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            self._warpers.append(TopPLogitsWarper(settings.top_p))
        self._number, self._before = -1, self._generator.get_state()

    def choose(self, number: int, tokens: Any, scores: Any) -> int:
        """Return a token. tokens: ``[1, n]``. scores: logits ``[1, vocabulary]``.

        Args:
            number: of the completion's tokens so far. Where it is that of the last call, the batch failed before the
                token was taken: it is chosen again, by the same random number.
        """
        if number == self._number:
            self._generator.set_state(self._before)
        else:
            self._number, self._before = number, self._generator.get_state()
        probabilities = self._warpers(tokens, scores).softmax(-1)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


class Chosen(Protocol):
    """A row of a batch, as :class:`Choosing` needs it."""

    chooser: Chooser | None
    tokens: list[int]
    done: bool


class Choosing(LogitsProcessor):
    """Leaves one token in each row that samples. Rows are in the order of the batch."""

    def __init__(self, rows: Sequence[Chosen]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Return the scores ``[rows, vocabulary]``, of sampling rows -inf but for the token that was drawn.

        Raises:
            NotFiniteError: the scores are not finite, of which no token is the likeliest.
        """
        check_logits(scores)
        for number, row in enumerate(self._rows):
            if row.chooser is not None and not row.done:
                one = slice(number, number + 1)
                token = row.chooser.choose(len(row.tokens), input_ids[one], scores[one])
                scores[number] = -torch.inf
                scores[number, token] = 0.0
        return scores
