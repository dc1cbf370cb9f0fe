"""Generation with caches of families: windows, cropped caches, an assistant, rotary tables that change on the way."""

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from obfuscatune import UnsupportedModelError

from .families import COMMON, RECORDED, WINDOW, model_of, randomize, twins_of, wide
from .models import error, tokens

LOGITS = 1e-6  # `generate` gives them in float32, of float64 models too; measured 0
GREEDY = {"do_sample": False, "pad_token_id": 0}
MONARCH = {"key_block": 4}


def prompt(ids: Any) -> dict[str, Any]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **GREEDY}


@pytest.mark.parametrize(
    ("family", "profile"),
    [
        ("mistral, window", "balanced"),
        ("mistral, window", "stream"),
        ("mistral, window", "strict"),
        ("qwen2, windows on some layers", "balanced"),
        ("gemma2", "balanced"),
        ("phi3, partial rotary, window", "balanced"),
        ("phi3, partial rotary, window", "stream"),
    ],
)
def test_many_tokens_beyond_a_window(protect: Any, family: str, profile: str) -> None:
    """Each step's logits too, which tokens alone would not tell apart."""
    with wide():
        reference, model = twins_of(family)
        arguments = {**prompt(tokens(2, WINDOW + 5)), "max_new_tokens": 4 * WINDOW, "eos_token_id": None}
        more = {"output_logits": True, "return_dict_in_generate": True}
        with protect(model, profile=profile, **MONARCH) as protected:
            expected, got = (m.generate(**arguments, **more) for m in (reference, protected.model))
    assert len(expected.logits) == 4 * WINDOW
    assert torch.equal(got.sequences, expected.sequences)
    assert error(torch.stack(got.logits), torch.stack(expected.logits)) < LOGITS


@pytest.mark.parametrize("profile", ["balanced", "stream", "strict", pytest.param("paper", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["llama", "mistral, window", "gemma2", "gpt_neox", "phi3, partial rotary, window"])
def test_speculation_crops_the_cache(protect: Any, family: str, profile: str) -> None:
    """By tokens of the prompt, and by an assistant whose guesses are mostly wrong."""
    if (family, profile) == ("gemma2", "stream"):  # refused
        return
    with wide():
        reference, model = twins_of(family)
        assistant = model_of(family, lora=False, seed=7)
        arguments = {**prompt(tokens(1, 4).repeat(1, 3)), "max_new_tokens": 12}
        plain = reference.generate(**arguments)
        with protect(model, profile=profile) as protected:
            assert torch.equal(protected.model.generate(**arguments, prompt_lookup_num_tokens=3), plain)
            assert torch.equal(protected.model.generate(**arguments, assistant_model=assistant), plain)


def test_speculation_with_a_window_whose_first_layer_is_inside(protect: Any) -> None:
    with wide():
        reference, model = twins_of("mistral, window")
        arguments = {**prompt(tokens(1, 4).repeat(1, 3)), "max_new_tokens": 12}
        with protect(model, profile="stream", enclave_blocks=1) as protected:
            got = protected.model.generate(**arguments, prompt_lookup_num_tokens=3)
        assert torch.equal(got, reference.generate(**arguments))


@pytest.mark.parametrize("profile", ["balanced", "strict"])
@pytest.mark.parametrize("family", ["mistral, window", "gemma2"])
def test_a_window_that_is_cropped_is_as_in_the_plain_model(protect: Any, family: str, profile: str) -> None:
    """``transformers`` refuses to crop a window that has forgotten tokens; so does a protected model, and no more."""
    reference, model = twins_of(family)
    ids = tokens(1, 9)
    with protect(model, profile=profile) as protected, torch.no_grad():
        for each in (reference, protected.model):
            cache = each(input_ids=ids, use_cache=True).past_key_values
            with pytest.raises(RuntimeError, match="does not track past states"):
                cache.crop(-3)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.5, 2.0],
    "long_factor": [2.0, 5.0, 9.0],
    "original_max_position_embeddings": 12,
    "factor": 4.0,
    "partial_rotary_factor": 1.0,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
CHANGING = {
    "phi3, longrope": lambda: Phi3Config(
        **{**COMMON, "hidden_size": 24}, resid_pdrop=0.0, embd_pdrop=0.0, rope_parameters=LONGROPE
    ),
    "llama, dynamic": lambda: LlamaConfig(
        **{**COMMON, "max_position_embeddings": 12}, head_dim=6, rope_parameters=DYNAMIC
    ),
}


@pytest.mark.parametrize("profile", ["balanced", "stream", "strict"])
@pytest.mark.parametrize("family", CHANGING)
def test_rotary_tables_that_change_while_tokens_are_made(protect: Any, family: str, profile: str) -> None:
    """Rows shorter than the original length at first, and longer later; then a short one again."""
    with wide():
        reference = randomize(AutoModelForCausalLM.from_config(CHANGING[family]()).double().eval())
        model = copy.deepcopy(reference)
        with protect(model, profile=profile, **MONARCH) as protected:
            for length, new in ((9, 12), (15, 4), (5, 3)):
                arguments = {**prompt(tokens(2, length)), "max_new_tokens": new, "eos_token_id": None}
                more = {"output_logits": True, "return_dict_in_generate": True}
                expected, got = (m.generate(**arguments, **more) for m in (reference, protected.model))
                assert torch.equal(got.sequences, expected.sequences)
                assert error(torch.stack(got.logits), torch.stack(expected.logits)) < LOGITS


@pytest.mark.parametrize("family", [name for name in RECORDED if "," not in name])
def test_attention_weights_are_refused_or_those_of_the_plain_model(protect: Any, family: str) -> None:
    ids = tokens(1, 5)
    stays = family in ("qwen3", "gemma3")  # attention, whose norms of each head no key commutes with
    reference, model = twins_of(family)
    for each in (reference, model):
        each.get_base_model().set_attn_implementation("eager")
    profile = "strict" if stays else "balanced"
    with protect(model, profile=profile) as protected, torch.no_grad():
        if stays:
            got, expected = (m(input_ids=ids, output_attentions=True).attentions for m in (protected.model, reference))
            assert len(got) == 2
            assert max(error(g, e) for g, e in zip(got, expected, strict=True)) < LOGITS
            return
        with pytest.raises(UnsupportedModelError, match="output_attentions"):
            protected.model(input_ids=ids, output_attentions=True)
        with pytest.raises(UnsupportedModelError, match="output_attentions"):
            protected.model.get_base_model().base_model(input_ids=ids, output_attentions=True)


@pytest.mark.parametrize(("family", "profile"), [("gemma2", "balanced"), ("llama", "stream")])
def test_a_refused_early_exit_leaves_the_model_as_it_was(protect: Any, family: str, profile: str) -> None:
    with protect(model_of(family), profile=profile) as protected, torch.no_grad():
        before = protected.model(tokens(1, 6)).logits
        with pytest.raises(UnsupportedModelError):
            protected.model.generate(tokens(1, 7), max_new_tokens=6, assistant_early_exit=1)
        assert torch.equal(protected.model(tokens(1, 6)).logits, before)
