"""LoRA factors that the worker trains: an SGD step there is one of the plain model, however training code writes it.

Keys must be orthogonal for that: SGD does not commute with others. Per-head keys are made so by head_kappa=1.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.helpers import rescale_adapter_scale
from torch import nn

from obfuscatune import NotFiniteError, UsageError

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


def saliency_between(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    """Gradients of an input alone, between backward and step, leave LoRA's as they are."""
    norms = []
    for batch in range(2):
        optimizer.zero_grad()
        loss(model, batch).backward()
        for backward in (torch.autograd.grad, lambda value, e: value.backward(inputs=[e])):
            embedded = model.get_input_embeddings()(BATCHES[3]).detach().requires_grad_()
            backward(scalar(model(inputs_embeds=embedded).logits), embedded)
        norms.append(float(nn.utils.clip_grad_norm_(trained(model), 0.5)))
        optimizer.step()
    return norms


def clipped_at_each_pass(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    norms = []
    for batch in range(3):
        loss(model, batch).backward()
        norms.append(float(nn.utils.clip_grad_norm_(trained(model), 0.3)))
    optimizer.step()
    return norms


def gradients_by_hand(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    """As `autograd.grad` returns them, scaled by a factor above 1, in other tensors."""
    for batch in range(2):
        optimizer.zero_grad()
        parameters = trained(model)
        found = torch.autograd.grad(loss(model, batch), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = None if gradient is None else gradient * 1.5
        optimizer.step()
    return []


def a_closure(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    def evaluate() -> Any:
        optimizer.zero_grad()
        value = loss(model, 0)
        value.backward()
        return value.detach()

    return [float(optimizer.step(evaluate)) for _ in range(2)]  # type: ignore[func-returns-value]


def with_a_gradient_scaler(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    scaler, norms = torch.amp.GradScaler("cpu", init_scale=2.0**10), []  # type: ignore[attr-defined]
    for batch in range(2):
        optimizer.zero_grad()
        scaler.scale(loss(model, batch)).backward()
        scaler.unscale_(optimizer)
        norms.append(float(nn.utils.clip_grad_norm_(trained(model), 0.3)))
        scaler.step(optimizer)
        scaler.update()
    return norms


def settings_change(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    zero_before_forward(model, optimizer)
    optimizer.param_groups[0].update({"lr": 0.03, "weight_decay": 0.4, "momentum": 0.2})
    return zero_before_forward(model, optimizer)


def an_added_group(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    wte = model.get_input_embeddings().weight.requires_grad_()
    optimizer.add_param_group({"params": [wte], "lr": 0.3, "weight_decay": 0.2})
    before = wte.detach().clone()
    zero_before_forward(model, optimizer)
    return [float((wte - before).detach().norm())]


def frozen_after(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    for name, parameter in model.named_parameters():
        if "lora_A" in name or ("lora_" in name and ".h.1." in name):
            parameter.requires_grad_(False)
    return accumulate_and_clip(model, optimizer)


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
    saliency_between,
    clipped_at_each_pass,
    gradients_by_hand,
    a_closure,
    with_a_gradient_scaler,
    settings_change,
    an_added_group,
    frozen_after,
]


def adapter(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" in name}


# A way is the enclave's, a variant the keys': fast are all ways under `paper`, and each under one of the others.
CELLS = [
    pytest.param(variant, way, id=f"{variant}-{way.__name__}", marks=[] if quick else [pytest.mark.slow])
    for row, variant in enumerate(ORTHOGONAL)
    for column, way in enumerate(WAYS)
    for quick in [variant == "paper" or (row % 4 == column % 4 and column < 9)]
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


def factors(model: nn.Module, kind: str = "lora_") -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if kind in name]


@torch.no_grad()
def put(model: nn.Module, values: list[torch.Tensor], kind: str = "lora_") -> None:
    for p, value in zip(factors(model, kind), values, strict=True):
        p.copy_(value)


def one_step(model: Any, optimizer: torch.optim.Optimizer, batch: int) -> None:
    optimizer.zero_grad()
    loss(model, batch).backward()
    optimizer.step()


def a_snapshot_put_back(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    snapshot = [p.detach().clone() for p in factors(model)]
    zero_before_forward(model, optimizer)
    put(model, snapshot)
    found = [loss(model, 0).item()]
    zero_before_forward(model, optimizer)
    return found


def one_factor_put_back(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    snapshot = [p.detach().clone() for p in factors(model, "lora_A")]
    zero_before_forward(model, optimizer)
    put(model, snapshot, "lora_A")
    return [loss(model, 0).item()]


def zeros_from_zeros(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    """B starts as PEFT has it, at 0."""
    with torch.no_grad():
        for p in factors(model, "lora_B"):
            p.zero_()
    zero_before_forward(model, optimizer)
    with torch.no_grad():
        for p in factors(model, "lora_B"):
            p.zero_()
    return [loss(model, 0).item()]


def halved_through_data(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    for batch in range(3):
        one_step(model, optimizer, batch)
        for p in factors(model, "lora_B"):
            p.data.mul_(0.5)
    return [loss(model, 0).item()]


def held_to_a_norm(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    for batch in range(3):
        one_step(model, optimizer, batch)
        with torch.no_grad():
            for p in factors(model, "lora_A"):
                p.renorm_(2, 0, 0.5)
    return [loss(model, 0).item()]


def another_adapter_for_one_call(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    found = []
    for batch in range(2):
        one_step(model, optimizer, batch)
        values = {name: 2 * p.detach() for name, p in model.named_parameters() if "lora_B" in name}
        with torch.no_grad():
            found.append(float(scalar(torch.func.functional_call(model, values, (BATCHES[0],)).logits)))
    return found


def another_adapter_between_backward_and_step(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    values = {name: 2 * p.detach() for name, p in model.named_parameters() if "lora_B" in name}
    loss(model, 0).backward()
    with torch.no_grad():
        found = float(scalar(torch.func.functional_call(model, values, (BATCHES[0],)).logits))
    optimizer.step()
    return [found]


def an_average_of_all_steps(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    average = [p.detach().clone() for p in factors(model)]
    for batch in range(3):
        one_step(model, optimizer, batch)
        for mean, p in zip(average, factors(model), strict=True):
            mean.lerp_(p.detach(), 0.3)
    put(model, average)
    return [loss(model, 0).item()]


def written_between_backward_and_step(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    for batch in range(2):
        optimizer.zero_grad()
        loss(model, batch).backward()
        for p in factors(model, "lora_B"):
            p.data.mul_(0.5)
        optimizer.step()
    return [loss(model, 0).item()]


def an_old_state_of_the_optimizer(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    """Its momentum goes back, and the adapter does not."""
    one_step(model, optimizer, 0)
    state = copy.deepcopy(optimizer.state_dict())
    zero_before_forward(model, optimizer)
    optimizer.load_state_dict(state)
    found = [loss(model, 0).item()]
    one_step(model, optimizer, 1)
    return found


WRITES = [
    a_snapshot_put_back,
    one_factor_put_back,
    zeros_from_zeros,
    halved_through_data,
    held_to_a_norm,
    another_adapter_for_one_call,
    another_adapter_between_backward_and_step,
    an_average_of_all_steps,
    written_between_backward_and_step,
    an_old_state_of_the_optimizer,
]


@pytest.mark.parametrize("way", WRITES)
@pytest.mark.parametrize("variant", ["paper", pytest.param("balanced", marks=pytest.mark.slow)])
def test_values_written_by_hand_are_those_of_the_plain_model(protect: Any, variant: str, way: Step) -> None:
    test_sgd_on_the_worker_is_plain_sgd(protect, variant, way)


def test_the_parameters_have_each_step(protect: Any) -> None:
    """Without a state_dict, which could ask for them."""
    reference, model = twins()
    one_step(reference, torch.optim.SGD(trained(reference), lr=0.1), 0)
    with protect(model, profile="paper") as protected:
        one_step(protected.model, protected.create_optimizer("sgd", lr=0.1), 0)
        for got, expected in zip(factors(model), factors(reference), strict=True):
            assert error(got.detach(), expected.detach()) < PARAMETERS


def test_factors_that_were_replaced_are_not_stepped(protect: Any) -> None:
    """A stock optimizer would go on with the old ones."""
    _, model = twins()
    with protect(model, profile="paper") as protected:
        optimizer = protected.create_optimizer("sgd", lr=0.1)
        module = next(m for name, m in model.named_modules() if name.endswith("lora_B.default"))
        module.weight = nn.Parameter(module.weight.detach().clone())
        loss(protected.model, 0).backward()
        before = adapter(protected.model)
        with pytest.raises(UsageError, match="was replaced after its optimizer"):
            optimizer.step()
        assert worst(adapter(protected.model), before) == 0
        one_step(protected.model, protected.create_optimizer("sgd", lr=0.1), 0)
        assert worst(adapter(protected.model), before) > 1e-3


def test_gradients_of_tensors_in_the_place_of_factors_are_refused(protect: Any) -> None:
    _, model = twins()
    values = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if "lora_B" in n}
    with protect(model, profile="paper") as protected:
        with pytest.raises(UsageError, match="in the place of LoRA's factors"):
            torch.func.functional_call(protected.model, values, (BATCHES[0],))
        loss(protected.model, 0).backward()


def test_a_step_that_is_not_finite_is_told_at_once(protect: Any) -> None:
    reference, model = twins()
    with protect(model, profile="paper") as protected:
        optimizer = protected.create_optimizer("sgd", lr=0.1)
        state, before = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in factors(model)]
        optimizer.zero_grad()
        (1e9 * loss(protected.model, 0)).backward()
        optimizer.param_groups[0]["lr"] = 1e308
        with pytest.raises(NotFiniteError):
            optimizer.step()
        assert all(torch.equal(p, b) for p, b in zip(factors(model), before, strict=True))
        for use in (model.state_dict, optimizer.step, lambda: loss(protected.model, 0)):
            with pytest.raises(NotFiniteError):
                use()
        with torch.no_grad():
            factors(model)[0].mul_(2)
        with pytest.raises(UsageError, match="written to after a step that failed"):
            loss(protected.model, 0)
        optimizer.load_state_dict(state)  # and all is well
        optimizer.zero_grad()
        for each, its in ((reference, torch.optim.SGD(trained(reference), lr=0.1)), (protected.model, optimizer)):
            zero_before_forward(each, its)
        assert worst(adapter(protected.model), adapter(reference)) < PARAMETERS


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


def freeze(model: nn.Module) -> None:
    """As LoRA-FA has it, and nothing of the last block."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name or ".h.1." in name:
            parameter.requires_grad_(False)


def test_what_is_frozen_before_stays_as_it_is(protect: Any) -> None:
    reference, model = twins()
    before = adapter(reference)
    freeze(reference)
    freeze(model)
    optimizer = torch.optim.SGD(trained(reference), lr=0.05, weight_decay=0.1)
    expected = accumulate_and_clip(reference, optimizer)
    with protect(model, profile="paper") as protected:
        optimizer = protected.create_optimizer("sgd", lr=0.05, weight_decay=0.1)
        assert accumulate_and_clip(protected.model, optimizer) == pytest.approx(expected, rel=NORMS)
        after = adapter(protected.model)
        assert worst(after, adapter(reference)) < PARAMETERS
        still = [name for name in after if torch.equal(after[name], before[name])]
        assert still == [name for name in after if "lora_A" in name or ".h.1." in name]
        next(p for name, p in protected.model.named_parameters() if "lora_A" in name).requires_grad_()
        loss(protected.model, 0).backward()
        with pytest.raises(UsageError, match="unfrozen after its optimizer"):
            optimizer.step()


def test_an_adapter_loaded_for_inference_has_no_optimizer(protect: Any) -> None:
    _, model = twins()
    model.requires_grad_(requires_grad=False)
    with protect(model, profile="paper") as protected:
        assert not trained(protected.model)
        with pytest.raises(UsageError, match="nothing of the model requires a gradient"):
            protected.create_optimizer("sgd", lr=0.1)


def test_a_frozen_anchor_beside_factors_that_are_not_is_refused(protect: Any) -> None:
    _, model = twins()
    with protect(model, profile="paper") as protected:
        next(p for name, p in protected.model.named_parameters() if "anchor" in name).requires_grad_(False)
        with pytest.raises(UsageError, match="frozen by its anchor"):
            loss(protected.model, 0)
        with torch.no_grad():
            loss(protected.model, 0)


def test_hooks_on_gradients_that_are_not_here_are_refused(protect: Any) -> None:
    _, model = twins()
    with protect(model, profile="paper") as protected:
        factor = [p for name, p in protected.model.named_parameters() if "lora_B" in name][-1]
        for register in (factor.register_hook, factor.register_post_accumulate_grad_hook):
            handle = register(lambda gradient: None)
            with pytest.raises(UsageError, match="a hook on the gradient of LoRA"):
                loss(protected.model, 0)
            with torch.no_grad():
                loss(protected.model, 0)
            handle.remove()
            loss(protected.model, 0).backward()


def graded(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.grad is not None]


def add_saved(p: nn.Parameter, saved: torch.Tensor) -> None:
    assert p.grad is not None
    p.grad.add_(saved)


def put_back(p: nn.Parameter, saved: torch.Tensor) -> None:
    p.grad = saved


def add_noise(p: nn.Parameter, saved: torch.Tensor) -> None:
    assert p.grad is not None
    p.grad.add_(1e-6 * torch.ones_like(saved))


@pytest.mark.parametrize(
    ("change", "cleared"),
    [
        (add_saved, True),
        (put_back, False),
        pytest.param(put_back, True, marks=pytest.mark.slow),
        pytest.param(add_noise, True, marks=pytest.mark.slow),
    ],
)
def test_gradients_that_are_not_the_workers_are_refused(
    protect: Any, change: Callable[[nn.Parameter, torch.Tensor], None], *, cleared: bool
) -> None:
    reference, model = twins()
    with protect(model, profile="paper") as protected:
        optimizer = protected.create_optimizer("sgd", lr=0.1)
        loss(protected.model, 0).backward()
        saved = [p.grad.clone() for p in graded(protected.model) if p.grad is not None]
        if cleared:
            optimizer.zero_grad()
        loss(protected.model, 1).backward()
        for parameter, gradient in zip(graded(protected.model), saved, strict=True):
            change(parameter, gradient)
        before = adapter(protected.model)
        with pytest.raises(UsageError, match="up to one factor"):
            optimizer.step()
        assert worst(adapter(protected.model), before) == 0
        zero_before_forward(protected.model, optimizer)  # the control: the next step is a right one
        zero_before_forward(reference, torch.optim.SGD(trained(reference), lr=0.1))
        assert worst(adapter(protected.model), adapter(reference)) < PARAMETERS


def test_gradients_that_cancel_are_no_fault(protect: Any) -> None:
    reference, model = twins()
    with protect(model, profile="paper") as protected:
        for each, optimizer in (
            (reference, torch.optim.SGD(trained(reference), lr=0.1)),
            (protected.model, protected.create_optimizer("sgd", lr=0.1)),
        ):
            loss(each, 0).backward()
            (-loss(each, 0)).backward()
            optimizer.step()
            (loss(each, 0) * 1e-9).backward()
            optimizer.step()
        assert worst(adapter(protected.model), adapter(reference)) < PARAMETERS


def test_groups_of_the_workers_parameters_are_refused(protect: Any) -> None:
    _, model = twins()
    with protect(model, profile="paper") as protected:
        optimizer = protected.create_optimizer("sgd", lr=0.1)
        factor = next(p for name, p in protected.model.named_parameters() if "lora_A" in name)
        with pytest.raises(UsageError, match="a group of an optimizer"):
            optimizer.add_param_group({"params": [factor]})
        stock = torch.optim.SGD([factor], lr=0.1)
        with pytest.raises(UsageError, match="create_optimizer"):
            stock.step()
        loss(protected.model, 0).backward()
        optimizer.param_groups[0]["maximize"] = True
        with pytest.raises(UsageError, match="maximize"):
            optimizer.step()
        optimizer.param_groups[0]["maximize"] = False
        optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][1:]
        with pytest.raises(UsageError, match="were edited"):
            optimizer.step()


@pytest.mark.parametrize("profile", ["paper", "balanced"])
def test_values_that_change_between_a_cached_prefix_and_the_rest(protect: Any, profile: str) -> None:
    reference, model = twins()

    def rest(each: Any) -> torch.Tensor:
        with torch.no_grad():
            cache = each(input_ids=BATCHES[0][:, :3], use_cache=True).past_key_values
            for name, parameter in each.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
            return each(input_ids=BATCHES[0][:, 3:], past_key_values=cache).logits

    with protect(model, profile=profile) as protected:
        assert error(rest(protected.model), rest(reference)) < PARAMETERS
