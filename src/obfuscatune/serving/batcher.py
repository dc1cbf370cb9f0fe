"""Requests computed together: one thread owns the model and runs rounds of stock ``generate``, padded on the left.

A round is one call of ``generate`` over rows of one adapter. It ends when all are done, or, after some steps, to let a
waiting request in: the next round takes the rows up where they were, with what they have so far as their prompts.
That costs their prefill again, so a round is at least an eighth as many steps as its longest row has tokens. In return
nothing but the stock decoding loop and the stock cache is needed, which every profile and family runs exactly.
transformers' own continuous batching is not used: it wants paged attention, and in ``balanced`` and ``stream``
attention and its cache are on the worker.
"""

import collections
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from obfuscatune.errors import ObfuscatuneError
from obfuscatune.serving.limits import ServerLimits
from obfuscatune.serving.metrics import Metrics
from obfuscatune.serving.models import ServedModel
from obfuscatune.serving.refusal import Refusal
from obfuscatune.serving.row import Row, most_steps
from obfuscatune.serving.sampling import Choosing

logger = logging.getLogger(__name__)

LEAST_STEPS = 8
PREFILL_SHARE = 8
TURN_STEPS = 64  # of one batch while requests wait that cannot join it: for another adapter, or computed alone


class Batcher:
    """The queue of requests, and the thread that computes them.

    Args:
        model: what it owns from :meth:`start` on.

    Attributes:
        fault: what ended the model's sessions, if anything has; nothing can be computed after that.
    """

    def __init__(self, model: ServedModel, limits: ServerLimits, metrics: Metrics) -> None:
        self._model, self._limits, self._metrics = model, limits, metrics
        self._rows: collections.deque[Row] = collections.deque()  # those that wait, oldest first
        self._running: Sequence[Row] = ()
        self._changed = threading.Condition()
        self._closed = False
        self.fault: BaseException | None = None
        self._on_fault: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)

    def start(self, on_fault: Callable[[], None]) -> None:
        """Begin to compute. on_fault: called once if the worker fails."""
        self._on_fault = on_fault
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests can be computed."""
        return self.fault is None and not self._closed and self._thread.is_alive()

    def load(self) -> tuple[int, int]:
        """Return how many requests wait, and how many are computed."""
        with self._changed:
            waiting = sum(not row.lapse() for row in self._rows)
            return waiting, sum(not row.done for row in self._running)

    def submit(self, row: Row) -> None:
        """Let a request wait for its turn.

        Raises:
            Refusal: 429 where too many wait, 503 where nothing can be computed any more.
        """
        with self._changed:
            if not self.alive:
                raise _unavailable()
            if sum(not waiting.lapse() for waiting in self._rows) >= self._limits.max_queue:
                raise Refusal.full(self._limits.max_queue)
            self._rows.append(row)
            self._changed.notify_all()

    def stop(self) -> None:
        """Answer what is not done with 503, at once, and compute no more of it; does not wait."""
        with self._changed:
            self._closed = True
            left = [*self._running, *self._rows]
            self._changed.notify_all()
        for row in left:
            row.fail(_unavailable())

    def close(self) -> None:
        """As :meth:`stop`, and wait for the end of the step that is computed; a worker is waited for no longer."""
        self.stop()
        if self._thread.ident is None:
            return
        self._thread.join(self._limits.drain_seconds)
        if self._thread.is_alive() and self._model.give_up():
            got = f"nothing within {self._limits.drain_seconds} s of the server's end"
            self._thread.join()
            self.fault = ObfuscatuneError("a worker does not answer", got=got, hint="start it again if it is gone")
        self._thread.join()

    def wants_turn(self, rows: Sequence[Row], steps: int, longest: int) -> bool:
        """Whether a round of so many steps shall end before its rows are done; ``longest``: tokens at its start."""
        if self._closed:
            return True
        if steps < max(LEAST_STEPS, longest // PREFILL_SHARE):
            return False
        with self._changed:
            joining = [_can_join(row, rows[0]) for row in self._rows if not row.lapse()]
            if steps >= TURN_STEPS and not all(joining):
                return True
            return any(joining) and sum(not row.done for row in rows) < self._limits.max_batch

    def _work(self) -> None:
        try:
            while rows := self._next():
                self._compute(rows)
        except BaseException as error:  # a panic in a tokenizer's Rust is no Exception
            self.fault = error
            logger.error("the batcher has ended: %s", type(error).__name__)
            self._on_fault()
        finally:
            with self._changed:
                self._closed = True
                left = [*self._running, *self._rows]
                self._rows.clear()
            for row in left:
                row.fail(_unavailable())

    def _next(self) -> list[Row]:
        """Wait for requests, and take those that share a batch with the oldest one; none at the end."""
        with self._changed:
            while True:
                live = [row for row in self._rows if not row.lapse()]
                self._rows.clear()
                self._rows.extend(live)
                if self._closed or self.fault is not None:
                    return []
                if live:
                    break
                self._changed.wait()
            first = live[0]
            chosen = [first, *(row for row in live[1:] if _can_join(row, first))][: self._limits.max_batch]
            self._running = chosen
            taken = set(map(id, chosen))
            self._rows = collections.deque(row for row in live if id(row) not in taken)
            return chosen

    def _compute(self, rows: list[Row]) -> None:
        try:
            self._round(rows)
        except Exception as error:
            if self._model.has_ended:
                self.fault = error
                logger.error("the worker failed: %s", type(error).__name__)
                self._on_fault()
            else:
                # One row may be what the model cannot take. Each is computed alone, and that one fails alone.
                logger.warning("a batch of %d failed: %s", len(rows), type(error).__name__)
            for row in rows:
                if self.fault is not None:
                    row.fail(_unavailable())
                elif len(rows) == 1:
                    row.fail(Refusal.internal())
                row.alone = True
        with self._changed:
            unfinished = [row for row in rows if not row.done]
            self._running = ()
            if all(_can_join(row, rows[0]) for row in self._rows):
                self._rows.extendleft(reversed(unfinished))
            else:  # it was a turn, which others have now
                self._rows.extend(unfinished)

    def _round(self, rows: Sequence[Row]) -> None:
        tokenizer, model = self._model.tokenizer, self._model.model
        batch = tokenizer.pad({"input_ids": [row.prompt + row.tokens for row in rows]}, return_tensors="pt")
        following = _Following(self, rows, batch["input_ids"].shape[1], self._model.ends, self._metrics)
        self._metrics.batched(len(rows))
        with torch.inference_mode(), self._model.using(rows[0].adapter):
            model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=most_steps(rows, self._model.positions),
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=list(self._model.ends) or None,
                logits_processor=LogitsProcessorList([Choosing(rows)]),
                stopping_criteria=StoppingCriteriaList([following]),
            )


class _Following(StoppingCriteria):
    """Hands each row its token after every step, and says which rows are done."""

    def __init__(
        self, batcher: Batcher, rows: Sequence[Row], longest: int, ends: Iterable[int], metrics: Metrics
    ) -> None:
        self._batcher, self._rows, self._longest, self._ends = batcher, rows, longest, frozenset(ends)
        self._metrics = metrics
        self._steps = 0

    def __call__(self, input_ids: Any, scores: Any, **more: Any) -> Any:
        self._steps += 1
        count = 0
        for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            if not row.lapse():
                row.take(token, self._ends)
                count += 1
        self._metrics.stepped(count)
        if self._batcher.wants_turn(self._rows, self._steps, self._longest):
            return torch.ones(len(self._rows), dtype=torch.bool)
        return torch.tensor([row.done for row in self._rows])


def _can_join(row: Row, other: Row) -> bool:
    return row.adapter == other.adapter and not row.alone and not other.alone


def _unavailable() -> Refusal:
    return Refusal(503, "the model cannot be asked any more", code="unavailable", retry_after=10)
