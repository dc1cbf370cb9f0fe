"""LoRA factors that the worker trains: an SGD step there is one of the plain model, however training code writes it.

Keys must be orthogonal for that: SGD does not commute with others. Per-head keys are made so by head_kappa=1.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.helpers import rescale_adapter_scale
from torch import nn

from obfuscatune import UsageError

from .models import error, scalar, tokens, twins, worst

PARAMETERS = 1e-9  # float64, relative; measured 2e-13
NORMS = 1e-9  # measured 1e-13
ORTHOGONAL = {
    "paper": ("paper", {}),
    "plain": ("plain", {"lora_placement": "worker"}),
    "balanced": ("balanced", {"key_block": 4, "head_kappa": 1.0, "lora_placement": "worker", "fold_norms": False}),
    "balanced, no head keys": (
        "balanced",
        {"key_block": 4, "head_keys": False, "lora_placement": "worker", "fold_norms": False},
    ),
    "balanced, both enclave": (
        "balanced",
        {"key_block": 4, "mlp": "enclave", "attention": "enclave", "lora_placement": "worker", "fold_norms": False},
    ),
}

Step = Callable[[Any, torch.optim.Optimizer], list[float]]
BATCHES = [tokens(2, 5, seed=seed) for seed in range(4)]


def loss(model: Any, batch: int) -> torch.Tensor:
    return scalar(model(input_ids=BATCHES[batch]).logits) / 50


def trained(model: Any) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def zero_before_forward(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    for batch in range(3):
        optimizer.zero_grad(set_to_none=True)
        loss(model, batch).backward()
        optimizer.step()
    return []


def zero_between_forward_and_backward(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    for batch in range(3):
        value = loss(model, batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return []


def zero_in_place(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    for batch in range(3):
        optimizer.zero_grad(set_to_none=False)
        loss(model, batch).backward()
        optimizer.step()
    return []


def model_zero_grad(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    for batch in range(3):
        loss(model, batch).backward()
        optimizer.step()
        model.zero_grad()
    return []


def accumulate_and_clip(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    norms = []
    for batch in (0, 2):
        for micro in (batch, batch + 1):
            loss(model, micro).backward()
        norms.append(float(nn.utils.clip_grad_norm_(trained(model), 0.3)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def step_twice_on_clipped_gradients(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    loss(model, 0).backward()
    norms = [float(nn.utils.clip_grad_norm_(trained(model), 0.3))]
    optimizer.step()
    optimizer.step()
    loss(model, 1).backward()  # on top of the clipped ones
    norms.append(float(nn.utils.clip_grad_norm_(trained(model), 0.2)))
    optimizer.step()
    return norms


def several_forwards_before_one_backward(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    for _ in range(2):
        optimizer.zero_grad()
        (loss(model, 0) + loss(model, 1) + loss(model, 2)).backward()
        optimizer.step()
    return []


def evaluate_between(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    norms = []
    for batch in range(2):
        loss(model, batch).backward()
        with torch.no_grad():
            loss(model, 3)
        loss(model, 3)  # a graph that never runs backward
        norms.append(float(nn.utils.clip_grad_norm_(trained(model), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def gradient_checkpointing(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    model.train()
    for reentrant in (False, True):
        model.enable_input_require_grads()
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        for batch in range(2):
            optimizer.zero_grad()
            (loss(model, batch) + loss(model, 3)).backward()
            optimizer.step()
    return []


WAYS = [
    zero_before_forward,
    zero_between_forward_and_backward,
    zero_in_place,
    model_zero_grad,
    accumulate_and_clip,
    step_twice_on_clipped_gradients,
    several_forwards_before_one_backward,
    evaluate_between,
    gradient_checkpointing,
]


def adapter(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" in name}


# A way is the enclave's, a variant the keys': fast are all ways under `paper`, and each under one of the others.
CELLS = [
    pytest.param(variant, way, id=f"{variant}-{way.__name__}", marks=[] if quick else [pytest.mark.slow])
    for row, variant in enumerate(ORTHOGONAL)
    for column, way in enumerate(WAYS)
    for quick in [variant == "paper" or row % 4 == column % 4]
]


@pytest.mark.parametrize(("variant", "way"), CELLS)
def test_sgd_on_the_worker_is_plain_sgd(protect: Any, variant: str, way: Step) -> None:
    profile, switches = ORTHOGONAL[variant]
    reference, model = twins()
    before = adapter(reference)
    options = {"lr": 0.05, "momentum": 0.5, "weight_decay": 0.01}
    expected = way(reference, torch.optim.SGD(trained(reference), **options))
    with protect(model, profile=profile, **switches) as protected:
        got = way(protected.model, protected.create_optimizer("sgd", **options))
        assert got == pytest.approx(expected, rel=NORMS)
        assert worst(adapter(protected.model), adapter(reference)) < PARAMETERS
        assert worst(before, adapter(reference)) > 1e-3  # the steps are no trifle


def test_a_stock_optimizer_over_the_anchors_is_refused(protect: Any) -> None:
    _, model = twins()
    with protect(model, profile="paper") as protected:
        optimizer = torch.optim.AdamW(trained(protected.model), lr=1e-3)
        loss(protected.model, 0).backward()
        with pytest.raises(UsageError, match="create_optimizer"):  # at once: a run of one step would train nothing
            optimizer.step()
        loss(protected.model, 0)


def test_values_loaded_after_a_step_are_used_and_kept(protect: Any) -> None:
    reference, model = twins()
    old = adapter(reference)
    with protect(model, profile="paper") as protected:
        zero_before_forward(protected.model, protected.create_optimizer("sgd", lr=0.1))
        protected.model.load_state_dict(old, strict=False)
        assert worst(adapter(protected.model), old) < PARAMETERS
        assert error(loss(protected.model, 0), loss(reference, 0)) < PARAMETERS


def test_adapter_is_current_after_close(protect: Any) -> None:
    reference, model = twins()
    zero_before_forward(reference, torch.optim.SGD(trained(reference), lr=0.1))
    with protect(model, profile="paper") as protected:
        zero_before_forward(protected.model, protected.create_optimizer("sgd", lr=0.1))
    assert worst(adapter(model), adapter(reference)) < PARAMETERS


def test_adapter_disabled_and_switched(protect: Any) -> None:
    reference, model = twins()
    with protect(model, profile="paper") as protected:
        with reference.disable_adapter(), protected.model.disable_adapter():
            assert error(loss(protected.model, 0), loss(reference, 0)) < PARAMETERS
        assert error(loss(protected.model, 0), loss(reference, 0)) < PARAMETERS


def test_a_state_of_other_keys_is_refused(protect: Any) -> None:
    """Factors under the keys of one session mean something else under those of another."""
    _, model = twins()
    with protect(model, profile="paper") as protected:
        optimizer = protected.create_optimizer("sgd", lr=0.1)
        zero_before_forward(protected.model, optimizer)
        state, values = optimizer.state_dict(), adapter(protected.model)
    for seed, is_right in ((13, False), (12, True)):
        _, model = twins()
        model.load_state_dict(values, strict=False)
        with protect(model, profile="paper", insecure_test_seed=seed) as protected:
            optimizer = protected.create_optimizer("sgd", lr=0.1)
            if is_right:
                optimizer.load_state_dict(state)
            else:
                with pytest.raises(UsageError, match="keyed otherwise"):
                    optimizer.load_state_dict(state)
            assert worst(adapter(protected.model), values) < PARAMETERS


def test_a_factor_of_another_kind_is_refused(protect: Any) -> None:
    _, model = twins()
    with protect(model, profile="paper") as protected:
        factor = next(p for name, p in protected.model.named_parameters() if "lora_A" in name)
        factor.data = factor.data.bfloat16()
        with pytest.raises(UsageError, match="another kind of tensor"):
            loss(protected.model, 0)


def test_training_under_another_scale(protect: Any) -> None:
    """`rescale_adapter_scale` and its like, between steps: what the worker trained meanwhile is kept."""
    reference, model = twins()
    with protect(model, profile="paper") as protected:
        for each, optimizer in (
            (reference, torch.optim.SGD(trained(reference), lr=0.05, momentum=0.5)),
            (protected.model, protected.create_optimizer("sgd", lr=0.05, momentum=0.5)),
        ):
            zero_before_forward(each, optimizer)
            with rescale_adapter_scale(each, 0.5):
                zero_before_forward(each, optimizer)
            zero_before_forward(each, optimizer)
        assert worst(adapter(protected.model), adapter(reference)) < PARAMETERS
