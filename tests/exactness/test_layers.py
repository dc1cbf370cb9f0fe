"""A layer by itself, in the place of a linear one: for inputs of any form its result is as that of ``nn.Linear``."""

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DogeConfig, LlamaConfig

import obfuscatune

from .families import SQUARE, adapted
from .models import error, gradients, scalar, worst
from .test_discovery import batch, model_of

EXACT = 1e-9  # float64; measured 3.9e-15, and 1.2e-13 under naive
SHARED = 1e-4  # see test_shared.py; measured 4e-7
WIDTH = SQUARE["hidden_size"]
ALONE = {"attention": "enclave", "mlp": "enclave", "fold_norms": False}

# Without biases: of a sum with one, torch makes a tensor of its own.
PLAIN = model_of(LlamaConfig(**SQUARE))
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "paper": ("paper", {}),
    "paper, no LoRA": ("paper", {}),
    "paper, lora enclave": ("paper", {"lora_placement": "enclave"}),
    "paper, lora split": ("paper", {"lora_placement": "split"}),
    "plain": ("plain", ALONE),
    "naive": ("naive", {}),
    "balanced": ("balanced", {**ALONE, "key_block": 4}),
    "strict": ("strict", {"key_block": 4}),
    "strict, no LoRA": ("strict", {"key_block": 4}),
    "shared": ("shared", {"worker": "spawn", "threads": 1}),
}


def inputs() -> dict[str, Tensor]:
    """Inputs of all numbers of axes, in several layouts, and without rows."""
    numbers = partial(torch.randn, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return {
        "a vector": numbers(WIDTH),
        "rows": numbers(7, WIDTH),
        "a batch": numbers(2, 5, WIDTH),
        "one more axis": numbers(2, 3, 4, WIDTH),
        "expanded": numbers(1, 5, WIDTH).expand(3, 5, WIDTH),
        "transposed": numbers(5, 2, WIDTH).transpose(0, 1),
        "by columns": numbers(2, WIDTH, 5).mT,
        "of a larger one": numbers(4, 5, WIDTH + 3)[::2, ::2, 1:-2],
        "no rows": numbers(0, WIDTH),
        "no tokens": numbers(2, 0, WIDTH),
    }


@pytest.fixture(params=VARIANTS)
def twins(request: pytest.FixtureRequest, worker: str) -> Iterator[tuple[str, Any, Any]]:
    """A plain model, and the same one protected."""
    profile, switches = VARIANTS[request.param]
    reference = copy.deepcopy(PLAIN) if request.param.endswith("no LoRA") else adapted(copy.deepcopy(PLAIN))
    options = {"worker": worker, "timeout": 60.0, "insecure_test_seed": 12, **switches}
    with obfuscatune.protect(copy.deepcopy(reference), profile=profile, **options) as run:
        yield profile, reference, run.model


@pytest.mark.filterwarnings("ignore:.*protect nothing:UserWarning")
def test_a_result_is_as_that_of_a_linear_layer(twins: tuple[str, Any, Any]) -> None:
    """q, k and v travel in one call, and each is contiguous: models look at them in other shapes."""
    profile, *models = twins
    for name, x in inputs().items():
        for trains in (False, True):
            found = []
            for model in models:
                leaf = x.detach().requires_grad_(trains)
                with torch.set_grad_enabled(trains):
                    results = [layer(leaf) for layer in _layers(model)]
                assert all(result.is_contiguous() for result in results), name
                if trains:
                    total = sum((y * torch.arange(y.numel()).view(y.shape).cos()).sum() for y in results)
                    total.backward()
                    results.append(leaf.grad)
                found.append(results)
            for got, expected in zip(*reversed(found), strict=True):
                assert got.shape == expected.shape and got.dtype == expected.dtype, name
                if got.numel():
                    assert error(got, expected) < (SHARED if profile == "shared" else EXACT), name


def _layers(model: Any) -> list[Any]:
    """Three that share an input, and one that does not."""
    attention = next(module for name, module in model.named_modules() if name.endswith("layers.0.self_attn"))
    return [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]


@pytest.mark.parametrize("profile", ["plain", "balanced"])
def test_a_whole_mlp_is_called_with_inputs_of_any_form(protect: Any, profile: str) -> None:
    reference = adapted(copy.deepcopy(PLAIN), target_modules=["gate_proj", "up_proj", "down_proj"])
    switches = {"key_block": 4} if profile == "balanced" else {}
    with protect(copy.deepcopy(reference), profile=profile, fold_norms=False, **switches) as run:
        mlps = [
            next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp")) for model in (run.model, reference)
        ]
        for name, x in inputs().items():
            found = []
            for mlp in mlps:
                leaf = x.detach().requires_grad_()
                y = mlp(leaf)
                (y * torch.arange(y.numel()).view(y.shape).cos()).sum().backward()
                found.append((y, leaf.grad))
            for got, expected in zip(*found, strict=True):
                assert got.shape == expected.shape and got.dtype == expected.dtype, name
                assert not got.numel() or error(got, expected) < EXACT, name
        for name, factor in gradients(reference).items():
            assert error(gradients(run.model)[name], factor) < EXACT, name


@pytest.mark.parametrize("profile", ["paper", "strict"])
def test_a_model_that_looks_at_a_result_in_another_shape(protect: Any, profile: str) -> None:
    """Doge's router, which travels with gate and up: its rows and columns are mixed by ``view``."""
    config = DogeConfig(**SQUARE, is_moe=True, num_experts=4, num_experts_per_tok=2)
    reference = adapted(model_of(config), target_modules=["q_proj", "down_proj"])
    ids, mask = batch()
    results = []
    with protect(copy.deepcopy(reference), profile=profile, lora_placement="enclave") as run:
        for each in (reference, run.model):
            logits = each(input_ids=ids, attention_mask=mask).logits[mask.bool()]
            scalar(logits).backward()
            results.append({"logits": logits.detach(), **gradients(each)})
        prompt = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
        assert torch.equal(*(each.generate(**prompt) for each in (reference, run.model)))
        report = run.report()
    experts = [path for path, _ in reference.named_parameters() if "_embed.weight" in path]
    inside = sum(reference.get_parameter(path).numel() for path in experts)
    assert len(experts) == 2 * 2 and report.enclave_parameters > inside  # embeddings, which stay
    assert len(results[0]) > 4
    assert worst(results[1], results[0]) < EXACT
