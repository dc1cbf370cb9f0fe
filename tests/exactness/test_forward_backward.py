"""Logits and all gradients of a protected model are those of the untouched one, under every profile and switch."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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

LOGITS_FLOAT64 = 1e-9
GRADIENTS_FLOAT64 = 1e-9
LOGITS_FLOAT32 = 1e-5

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
@settings(max_examples=5)
def test_float64_logits_and_all_gradients(
    protect: Any, variant: str, config: dict[str, Any], batch: int, length: int, lora: bool
) -> None:
    profile, switches = VARIANTS[variant]
    reference, model = twins(lora=lora, **config)
    train_everything_that_stays(reference)
    train_everything_that_stays(model)
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
        print("ERR", worst(got, expected), worst(gradients(protected.model), expected_grads))
        assert worst(gradients(protected.model), expected_grads) < GRADIENTS_FLOAT64
