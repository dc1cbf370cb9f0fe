"""Whose turn it is: a model that writes down its rounds, and says who asked what under which adapter."""

import asyncio
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from obfuscatune import protect
from obfuscatune.errors import NotFiniteError, UnsupportedModelError
from obfuscatune.profiles import resolve
from obfuscatune.serving.batcher import TURN_STEPS, Batcher
from obfuscatune.serving.generation import Generation
from obfuscatune.serving.limits import ServerLimits
from obfuscatune.serving.metrics import Metrics
from obfuscatune.serving.models import ServedModel, serve_model
from obfuscatune.serving.refusal import Refusal
from obfuscatune.serving.row import Row
from obfuscatune.serving.sampling import Choosing, Settings
from obfuscatune.serving.text import Text


class Model:
    """Its next token is the number of the adapter in use."""

    ends, has_ended, positions = frozenset({99}), False, None

    def __init__(self, poison: int | None = None) -> None:
        self.model, self.tokenizer, self.adapter = self, None, 0
        self.rounds: list[tuple[int, int, int]] = []  # adapter, rows, steps
        self.poison = poison

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        self.adapter = int(name)
        yield

    def generate(self, input_ids: Any, stopping_criteria: Any, max_new_tokens: int, **more: Any) -> None:
        if self.poison is not None and (input_ids == self.poison).any():
            raise ValueError("what this model cannot take")
        steps, done = 0, torch.tensor(False)
        while not done.all() and steps < max_new_tokens:
            token = torch.full((len(input_ids), 1), self.adapter)
            input_ids, steps = torch.cat([input_ids, token], dim=1), steps + 1
            done = stopping_criteria(input_ids, None)
        self.rounds.append((self.adapter, len(input_ids), steps))


@pytest.fixture
def run(tokenizer: Any) -> Callable[..., list[Row]]:
    """Let a model compute requests that all wait when it begins: of each the adapter, and how many tokens it wants."""
    padding = tokenizer.__class__(tokenizer_object=tokenizer._tokenizer, pad_token="<end>", padding_side="left")

    def run(
        model: Model, asked: list[tuple[int, int]], *, alone: tuple[int, ...] = (), max_batch: int = 8
    ) -> list[Row]:
        model.tokenizer = padding

        async def scene() -> list[Row]:
            batcher = Batcher(model, ServerLimits(max_batch=max_batch, max_queue=len(asked)), Metrics())  # type: ignore[arg-type]
            rows = []
            for number, (adapter, longest) in enumerate(asked):
                text = Text(tokenizer)
                row = Row(str(adapter), [number + 1], Settings(longest=longest), text, seconds=60, streaming=False)
                row.alone = number in alone
                rows.append(row)
                # The batcher has no thread yet, but takes requests.
                batcher._rows.append(row)
            batcher.start(on_fault=lambda: None)
            try:
                for row in rows:
                    await asyncio.wait_for(row.queue.get(), 30)
            finally:
                await asyncio.to_thread(batcher.close)
            return rows

        return asyncio.run(scene())

    return run


def test_a_row_that_is_computed_alone_gives_its_turn_to_those_who_wait(run: Any) -> None:
    run(model := Model(), [(1, 200), (1, 10)], alone=(0,))
    assert model.rounds == [(1, 1, TURN_STEPS), (1, 1, 10), (1, 1, 200 - TURN_STEPS)]


def test_those_who_share_a_batch_give_their_turn_to_a_row_that_cannot(run: Any) -> None:
    run(model := Model(), [(1, 200), (1, 300), (1, 10)], alone=(2,))
    assert model.rounds[:2] == [(1, 2, TURN_STEPS), (1, 1, 10)]


def test_a_full_batch_with_more_behind_it_gives_another_adapter_its_turn(run: Any) -> None:
    run(model := Model(), [(1, 200), (1, 200), (1, 200), (2, 10)], max_batch=2)
    assert model.rounds[:3] == [(1, 2, TURN_STEPS), (1, 2, TURN_STEPS), (2, 1, 10)]


def test_what_the_model_cannot_take_fails_alone(run: Any) -> None:
    rows = run(Model(poison=3), [(1, 20)] * 6)  # the third one's prompt
    assert [row.failure is not None for row in rows] == [number == 2 for number in range(6)]
    assert all(row.tokens == [1] * 20 for row in rows if row.failure is None)


def test_each_gets_the_tokens_of_its_own_adapter(run: Any) -> None:
    asked = [(1 + number // 3 % 3, 5 + 17 * number % 150) for number in range(60)]
    rows = run(Model(), asked, max_batch=3)
    assert [row.tokens for row in rows] == [[adapter] * longest for adapter, longest in asked]


def test_no_token_is_chosen_of_scores_that_are_no_numbers() -> None:
    choosing, scores = Choosing([]), torch.zeros(2, 5)
    scores[0, :4] = -torch.inf  # forbidden tokens, as stock processors leave them
    assert choosing(torch.zeros(2, 1), scores) is scores
    for bad in (torch.nan, torch.inf):
        scores[1, 2] = bad
        with pytest.raises(NotFiniteError, match="the logits of the model are not finite"):
            choosing(torch.zeros(2, 1), scores)


def test_a_worker_that_stands_still_keeps_neither_a_client_nor_the_end_of_the_server(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("obfuscatune.enclave.lifetime.ENDING_SECONDS", 0.1)
    limits, metrics = ServerLimits(seconds=0.5, drain_seconds=0), Metrics()
    protection = {"profile": resolve("balanced"), "worker": "spawn", "threads": 1, "timeout": 600.0}

    async def scene(served: ServedModel, batcher: Batcher) -> None:
        first, second = (Generation(served, batcher, limits, metrics, "base", "prompt") for _ in range(2))
        queue, _ = first.stream([5, 6], Settings(longest=3))
        late = second.complete([5, 6], Settings(longest=3))
        with pytest.raises(Refusal, match="the time of the request is over"):
            await asyncio.wait_for(late, 20)
        await asyncio.wait_for(queue.get(), 20)
        assert first.failure is not None
        assert first.failure.status == 504

    with serve_model(str(model_dir), "float32", {}, protection, None) as served:
        batcher = Batcher(served, limits, metrics)
        batcher.start(on_fault=lambda: None)
        process = served.protected.links[0].session.process
        assert process is not None
        process.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        asyncio.run(scene(served, batcher))
        batcher.close()
        assert time.monotonic() - start < 60  # and not the worker's 600
        assert str(batcher.fault).startswith("a worker does not answer: got nothing within 0 s of the server's end")


@pytest.mark.parametrize("profile", ["enclave", "balanced", pytest.param("stream", marks=pytest.mark.slow)])
def test_continuous_batching_of_transformers_runs_only_where_attention_is_here(profile: str, model_dir: Path) -> None:
    """Why there is a batcher of our own: docs/serving.md says which and why."""
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=256)
    prompt = [5, 6, 7]
    with protect(model, profile=profile, worker="spawn", threads=1) as protected:
        out = protected.model.generate(torch.tensor([prompt]), generation_config=config)[0, 3:].tolist()
        batching = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
        if profile != "enclave":
            with pytest.raises(UnsupportedModelError, match="continuous batching"):
                protected.model.generate_batch([prompt], config, batching, progress_bar=False)
            return
        (found,) = protected.model.generate_batch([prompt], config, batching, progress_bar=False).values()
    assert (found.error, found.generated_tokens) == (None, out)


def test_a_token_that_was_not_taken_is_chosen_again_by_the_same_random_number(run: Any) -> None:
    """A batch may fail after a row's choice: alone, the row goes on as if nothing had happened."""
    scores = torch.randn(1, 300, generator=torch.Generator().manual_seed(0))

    def tokens(tries: int) -> list[int]:
        chooser = Settings(longest=9, temperature=1.0, seed=5).chooser()
        assert chooser is not None
        return [[chooser.choose(number, None, scores.clone()) for _ in range(tries)][-1] for number in range(9)]

    assert tokens(1) == tokens(2) and len(set(tokens(1))) > 5
