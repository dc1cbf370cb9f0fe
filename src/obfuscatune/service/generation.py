"""Rounds of generation for queries: rows of one batch, each by its own settings, in pieces of time.

A round is one call of stock ``generate`` over rows padded on the left, as in `serving.batcher`, whose choice of tokens
and text this uses. It ends when all rows are done, or when ``enough`` says so: the next round takes the rows up where
they were, with what they have so far as their prompts. So a training that waits gets its turn in the middle of an
answer, and a query that came later joins. Here the thread is the service's, which has jobs to run too.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from obfuscatune.service.queries import Query
from obfuscatune.serving.row import most_steps
from obfuscatune.serving.sampling import Choosing
from obfuscatune.serving.text import Text, decoded
from obfuscatune.training.completion import Completion
from obfuscatune.training.encoding import positions_of
from obfuscatune.training.quiet import Quiet

Enough = Callable[[int, int], bool]  # of a round's steps so far, and its longest row's tokens at its start


class Row:
    """One prompt of a query while it is completed. Secret.

    Args:
        query: whose it is. where: the prompt's name in errors. prompt: its tokens. tokenizer: of the model.
        positions: of prompt and completion together, None where the model has no limit.

    Attributes:
        tokens: of the completion so far. done: nothing more will come. chooser: samples, or None for greedy decoding.
    """

    def __init__(
        self, query: Query, where: str, prompt: list[int], tokenizer: Any, positions: int | None = None
    ) -> None:
        self.query, self.prompt, self.tokens = query, prompt, list[int]()
        self.settings = replace(query.settings)
        if positions is not None:
            self.settings.longest = min(self.settings.longest, positions - len(prompt))
        self.chooser = self.settings.chooser()
        self.done = False
        self._where, self._tokenizer = where, tokenizer
        self._text = Text(tokenizer, self.settings.stop) if query.streaming or self.settings.stop else None

    @property
    def left(self) -> int:
        """How many tokens may still come."""
        return self.settings.longest - len(self.tokens)

    def lapse(self) -> bool:
        """End it where whoever asked has left, and return whether it is done."""
        self.done = self.done or self.query.left
        return self.done

    def take(self, token: int, ends: frozenset[int]) -> None:
        """Add the next token; ``ends`` are those that end a completion. Raises DataError."""
        with Quiet("the tokenizer fails on the completion", where=self._where):
            if token in ends:
                self.settings.stopped = self.done = True
            else:
                self.tokens.append(token)
                self._show("" if self._text is None else self._text.push(token))
                self.done = self.left <= 0 or (self._text is not None and self._text.stopped)
            if self.done and self._text is not None:
                self._show(self._text.end())
                self.settings.stopped = self.settings.stopped or self._text.stopped

    def _show(self, piece: str) -> None:
        if piece and self.query.streaming:
            self.query.show(piece, len(self.tokens))

    def completion(self) -> Completion:
        """Return what it has come to. Raises as :meth:`take`."""
        if self._text is not None:
            text = self._text.text
        else:
            with Quiet("the tokenizer fails on the completion", where=self._where):
                text = decoded(self._tokenizer, self.tokens)
        return Completion(text, len(self.prompt), len(self.tokens), self.settings.stopped)


def compute(model: Any, tokenizer: Any, rows: Sequence[Row], ends: Sequence[int], enough: Enough) -> None:
    """Compute one round.

    Args:
        model, tokenizer: of each other; the tokenizer pads on the left. rows: none of them done.
        ends: tokens that end a completion. enough: asked after each step.

    Raises:
        As the model and :meth:`Row.take`; what the rows have by then stays.
    """
    batch = tokenizer.pad({"input_ids": [row.prompt + row.tokens for row in rows]}, return_tensors="pt")
    following = _Following(rows, batch["input_ids"].shape[1], frozenset(ends), enough)
    with torch.inference_mode():
        model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=most_steps(rows, positions_of(model.config)),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=list(ends) or None,
            do_sample=False,
            logits_processor=LogitsProcessorList([Choosing(rows)]),
            stopping_criteria=StoppingCriteriaList([following]),
        )


class _Following(StoppingCriteria):
    """Hands each row its token after every step, and says which rows are done."""

    def __init__(self, rows: Sequence[Row], longest: int, ends: frozenset[int], enough: Enough) -> None:
        self._rows, self._longest, self._ends, self._enough = rows, longest, ends, enough
        self._steps = 0

    def __call__(self, input_ids: Any, scores: Any, **more: Any) -> Any:
        self._steps += 1
        for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            if not row.lapse():
                row.take(token, self._ends)
        if self._enough(self._steps, self._longest):
            return torch.ones(len(self._rows), dtype=torch.bool)
        return torch.tensor([row.done for row in self._rows])
