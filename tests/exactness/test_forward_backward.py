"""Logits and all gradients of a protected model are those of the untouched one, under every profile and switch."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from obfuscatune.enclave.remote.linear import RemoteLinear

from .models import (
    VARIANTS,
    error,
    expected_gradients,
    gpt2,
    gradients,
    scalar,
    tokens,
    train_everything_that_stays,
    twins,
    with_lora,
    worst,
)

# All relative to the largest entry of the tensor. Measured, the worst of all variants and configurations:
LOGITS_FLOAT64 = 1e-9  # 1e-13
GRADIENTS_FLOAT64 = 1e-9  # 1.2e-13
LOGITS_FLOAT32 = 1e-5  # 1.6e-6
# A Gaussian key of condition number kappa may amplify a relative rounding error by kappa; there are four keyed products
# a block, each of sums over up to 96 terms, and their errors add up. Measured: at most 0.36.
NAIVE_FACTOR = 8.0

EXACT = [name for name in VARIANTS if name != "naive"]


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    heads, head_dim = draw(st.integers(1, 3)), draw(st.sampled_from([3, 4, 5, 8]))
    return {
        "n_head": heads,
        "n_embd": heads * head_dim,
        "n_inner": draw(st.sampled_from([None, 7, 33])),
        "n_layer": draw(st.integers(1, 2)),
        "activation_function": draw(st.sampled_from(["relu", "gelu", "gelu_new", "silu"])),
        "scale_attn_weights": draw(st.booleans()),
        "scale_attn_by_inverse_layer_idx": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
    }


@pytest.mark.parametrize("variant", EXACT)
@given(config=configurations(), batch=st.integers(1, 3), length=st.integers(1, 6), lora=st.booleans())
@settings(max_examples=3)  # of each of the variants
def test_float64_logits_and_all_gradients(
    protect: Any, variant: str, config: dict[str, Any], batch: int, length: int, lora: bool
) -> None:
    profile, switches = VARIANTS[variant]
    config["n_layer"] = max(config["n_layer"], 1 + switches.get("enclave_blocks", 0))
    reference, model = twins(lora=lora, **config)
    for each in (reference, model):
        train_everything_that_stays(each, profile, switches)
    ids = tokens(batch, length)
    embeds = torch.randn(batch, length, config["n_embd"], generator=torch.Generator().manual_seed(5)).double()
    with protect(model, profile=profile, **switches) as protected:
        outputs = []
        for each in (reference, protected.model):
            leaf = embeds.clone().requires_grad_()
            logits = each(input_ids=ids).logits
            scalar(logits).backward()
            from_embeds = each(inputs_embeds=leaf).logits
            scalar(from_embeds).backward()
            outputs.append({"logits": logits.detach(), "from embeds": from_embeds.detach(), "embeds": leaf.grad})
        expected, got = outputs
        assert worst(got, expected) < LOGITS_FLOAT64
        if not lora:  # the base weights that left are trained nowhere
            for name, parameter in reference.named_parameters():
                if name not in dict(protected.model.named_parameters()):
                    parameter.grad = None
        expected_grads = expected_gradients(reference, profile, switches)
        assert worst(gradients(protected.model), expected_grads) < GRADIENTS_FLOAT64


@pytest.mark.parametrize("variant", EXACT)
@given(config=configurations(), batch=st.integers(1, 3), length=st.integers(1, 6))
@settings(max_examples=2)
def test_float32_logits_and_greedy_tokens(
    protect: Any, variant: str, config: dict[str, Any], batch: int, length: int
) -> None:
    profile, switches = VARIANTS[variant]
    config["n_layer"] = max(config["n_layer"], 1 + switches.get("enclave_blocks", 0))
    reference, model = twins(dtype=torch.float32, **config)
    ids = tokens(batch, length)
    with protect(model, profile=profile, **switches) as protected, torch.no_grad():
        assert error(protected.model(input_ids=ids).logits, reference(input_ids=ids).logits) < LOGITS_FLOAT32
        greedy = {"max_new_tokens": 6, "do_sample": False}
        prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(protected.model.generate(**prompt, **greedy), reference.generate(**prompt, **greedy))


@given(config=configurations(), batch=st.integers(1, 3), length=st.integers(1, 6))
@settings(max_examples=6)
def test_naive_is_within_its_condition_number_times_rounding(
    protect: Any, config: dict[str, Any], batch: int, length: int
) -> None:
    reference, model = twins(**config)
    ids = tokens(batch, length)
    embeds = torch.randn(batch, length, config["n_embd"], generator=torch.Generator().manual_seed(5)).double()
    leaves = [embeds.clone().requires_grad_() for _ in range(2)]
    with protect(model, profile="naive") as protected:
        with torch.no_grad():
            got = protected.model(input_ids=ids).logits
        keys = [
            key
            for module in protected.model.modules()
            if isinstance(module, RemoteLinear)
            for key in (module.group.placed.key_in, module.group.placed.key_out)
        ]
        amplification = sum(key.condition_number for key in keys)
        bound = NAIVE_FACTOR * amplification * torch.finfo(torch.float64).eps
        assert error(got, reference(input_ids=ids).logits) < bound
        for each, leaf in zip((reference, protected.model), leaves, strict=True):
            scalar(each(inputs_embeds=leaf).logits).backward()
        assert error(leaves[1].grad, leaves[0].grad) < bound


def test_norms_with_a_gain_of_zero(protect: Any) -> None:
    """A gain of zero cannot be divided by: nothing of the norm's own output may come from the normalized rows."""
    reference = gpt2()
    for block in reference.transformer.h:
        block.ln_1.weight.data[2], block.ln_2.weight.data[3] = 0.0, 0.0
    reference = with_lora(reference)
    model = copy.deepcopy(reference)
    ids = tokens(2, 5)
    with protect(model) as protected:
        for each in (reference, protected.model):
            scalar(each(input_ids=ids).logits).backward()
        assert worst(gradients(protected.model), gradients(reference)) < GRADIENTS_FLOAT64
