"""The worker forgets what is no longer needed: calls after their backward or their end, caches with the enclave's."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import obfuscatune
from obfuscatune.errors import UnsupportedModelError

from .workers import IDS, generate, loss_of, new_model, worker_in_a_thread


@pytest.fixture(params=["plain", "paper", "balanced", "stream"])
def protected(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    with (
        worker_in_a_thread(tmp_path) as address,
        obfuscatune.protect(new_model(), profile=request.param, worker=address, timeout=60) as protected,
    ):
        yield protected


def kept_by(protected: Any) -> tuple[int, int]:
    gc.collect()
    reply, _ = protected.session.request("stats", "-", {}, {}, {})
    return reply["kept_calls"], reply["caches"]


def test_a_training_step_leaves_nothing(protected: Any) -> None:
    loss = loss_of(protected.model)
    assert kept_by(protected)[0] > 0
    loss.backward()
    assert kept_by(protected) == (0, 0)


def test_a_loss_that_is_dropped_leaves_nothing(protected: Any) -> None:
    losses = [loss_of(protected.model) for _ in range(3)]
    assert kept_by(protected)[0] > 0
    del losses
    assert kept_by(protected) == (0, 0)


def test_an_exception_between_forward_and_backward_leaves_nothing(protected: Any) -> None:
    def step() -> None:
        loss_of(protected.model)
        raise RuntimeError("of the caller")

    with pytest.raises(RuntimeError):
        step()
    assert kept_by(protected) == (0, 0)


def test_a_generation_leaves_nothing(protected: Any) -> None:
    with torch.no_grad():
        generate(protected.model)
    assert kept_by(protected) == (0, 0)


def test_a_cache_lives_as_long_as_the_enclaves(protected: Any) -> None:
    cache = DynamicCache()
    with torch.no_grad():
        protected.model(input_ids=IDS, past_key_values=cache, use_cache=True)
    if protected.profile.attention == "worker":
        assert kept_by(protected) == (0, 1)
    del cache
    assert kept_by(protected) == (0, 0)


def test_evaluation_keeps_nothing(protected: Any) -> None:
    with torch.no_grad():
        loss = loss_of(protected.model)
    assert kept_by(protected) == (0, 0)
    assert torch.isfinite(loss)


def test_a_second_backward_is_refused_with_the_reason(protected: Any) -> None:
    loss = loss_of(protected.model)
    loss.backward(retain_graph=True)
    with pytest.raises(UnsupportedModelError, match="backward a second time"):
        loss.backward()
    assert kept_by(protected) == (0, 0)
