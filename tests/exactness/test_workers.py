"""One model on two workers: the results are those of the plain model, and each worker has its own blocks only."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from obfuscatune.errors import UsageError

from .families import model_of, wide
from .models import error, expected_gradients, gradients, scalar, tokens, twins, worst

BOUND = 1e-9
PROFILES = ["plain", "naive", "paper", "balanced", "strict", "stream"]


@pytest.fixture
def protect_on_two(protect: Callable[..., Any], worker: str, second_worker: str) -> Callable[..., Any]:
    """`protect` with both workers."""
    return lambda model, **options: protect(model, **{"worker": [worker, second_worker], **options})


@pytest.mark.parametrize("profile", PROFILES)
def test_logits_gradients_and_tokens(profile: str, protect_on_two: Callable[..., Any]) -> None:
    reference, model = twins(n_layer=3)
    ids, mask = tokens(2, 7), torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    bound = 1e-7 if profile == "naive" else BOUND  # its keys' condition numbers are in the hundreds
    real = mask == 1  # what a row attends to in padding is nobody's matter
    expected = reference(ids, attention_mask=mask).logits[real]
    scalar(expected).backward()
    with protect_on_two(model, profile=profile) as protected:
        got = protected.model(ids, attention_mask=mask).logits[real]
        assert error(got, expected) < bound
        scalar(got).backward()
        assert worst(gradients(protected.model), expected_gradients(reference, profile, {})) < bound
        options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "num_beams": 2}
        assert torch.equal(protected.model.generate(ids, **options), reference.generate(ids, **options))
        report = protected.report()
    names, first = [part.name for part in report.workers], report.workers[0]
    assert len(set(names)) == 2
    assert [part.blocks for part in report.workers] == [2, 1]
    assert first.parameters == pytest.approx(report.worker_parameters * 2 / 3, rel=0.02)
    assert all(part.traffic["define"].calls for part in report.workers)
    assert str(report).count("unix://") >= 3


@pytest.mark.parametrize("profile", ["balanced", "stream"])
def test_rotary_tables_and_windows_on_both(profile: str, protect_on_two: Callable[..., Any]) -> None:
    with wide():
        reference = model_of("mistral, window")
        model = copy.deepcopy(reference)
        ids = tokens(2, 9)
        with protect_on_two(model, profile=profile) as protected, torch.no_grad():
            assert error(protected.model(ids).logits, reference(ids).logits) < BOUND
            options = {"max_new_tokens": 6, "do_sample": False}
            assert torch.equal(protected.model.generate(ids, **options), reference.generate(ids, **options))


def test_factors_that_two_workers_train(protect: Callable[..., Any], protect_on_two: Callable[..., Any]) -> None:
    """Steps, clipping over both, and a state that goes on: as with one worker."""
    one, two = twins(n_layer=2, dtype=torch.float64)
    ids = tokens(2, 7)

    def steps(protected: Any, optimizer: Any, count: int) -> None:
        for _ in range(count):
            protected.model(ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_([p for p in protected.model.parameters() if p.requires_grad], 0.05)
            optimizer.step()
            optimizer.zero_grad()

    def adapter(protected: Any) -> dict[str, torch.Tensor]:
        return {name: t.clone() for name, t in protected.model.state_dict().items() if "lora_" in name}

    with protect(one, profile="paper") as protected:
        steps(protected, protected.create_optimizer(lr=1e-2), 4)
        expected = adapter(protected)
    with protect_on_two(two, profile="paper") as protected:
        first = protected.create_optimizer(lr=1e-2)
        steps(protected, first, 2)
        state, values = copy.deepcopy(first.state_dict()), adapter(protected)
        steps(protected, first, 1)
        protected.model.load_state_dict(values, strict=False)
        second = protected.create_optimizer(lr=1e-2)
        second.load_state_dict(state)
        steps(protected, second, 2)
        assert worst(adapter(protected), expected) < 1e-12


def test_more_workers_than_blocks(protect_on_two: Callable[..., Any]) -> None:
    _, model = twins(n_layer=1)
    with pytest.raises(UsageError, match="more workers than blocks: got 2"):
        protect_on_two(model, profile="balanced")


def test_one_of_two_workers_is_not_there(protect_on_two: Callable[..., Any], worker: str, tmp_path: Any) -> None:
    reference, model = twins(n_layer=2)
    with pytest.raises(UsageError, match="no worker answers"):
        protect_on_two(model, profile="balanced", worker=[worker, f"unix://{tmp_path}/none"])
    with protect_on_two(model, profile="balanced") as protected:  # the first worker is free again, the model whole
        assert error(protected.model(tokens(1, 5)).logits, reference(tokens(1, 5)).logits) < BOUND
