"""Configurations as they are on the hub, in the words of older versions, with small numbers in them."""

import contextlib
import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from obfuscatune import PROFILES, UnsupportedModelError
from obfuscatune.enclave.families import FAMILIES
from obfuscatune.training.loading import load_config

from .families import adapted, randomize, wide
from .models import error, gradients, scalar
from .test_families import EXACT, MONARCH, padded
from .test_families_random import of_gradients

COMMON: dict[str, Any] = {
    **{"vocab_size": 37, "bos_token_id": 0, "eos_token_id": [0, 1], "pad_token_id": 0, "torch_dtype": "bfloat16"},
    **{"hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "use_cache": True},
}
LLAMA3 = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 16}
WIDE = {**COMMON, "hidden_size": 32, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "original_max_position_embeddings": 8}
GEMMA = {**COMMON, "head_dim": 8, "query_pre_attn_scalar": 7, "sliding_window": 4, "cache_implementation": "hybrid"}
NEOX = {name: value for name, value in COMMON.items() if name != "num_key_value_heads"}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_ctx": 64, "n_inner": 20, "vocab_size": 37}
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}

HUB: dict[str, dict[str, Any]] = {
    "Llama 3.2": {
        **COMMON, "model_type": "llama", "head_dim": 6, "rope_theta": 5e5, "tie_word_embeddings": True,
        "rope_scaling": {**LLAMA3, "rope_type": "llama3"}, "pretraining_tp": 1, "attention_bias": False,
    },
    "SmolLM2": {
        **COMMON, "model_type": "llama", "hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3,
        "tie_word_embeddings": True, "rope_interleaved": False, "is_llama_config": True,
    },
    "DeepSeek Coder": {**COMMON, "model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}},
    "YaRN Llama": {
        **COMMON, "model_type": "llama",
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "finetuned": True},
    },
    "Mistral Nemo": {**COMMON, "model_type": "mistral", "head_dim": 10, "sliding_window": None, "rope_theta": 1e6},
    "Qwen2.5": {
        **COMMON, "model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4, "max_window_layers": 2,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, "use_mrope": False,
    },
    "Qwen3": {**COMMON, "model_type": "qwen3", "head_dim": 10, "use_sliding_window": False, "sliding_window": None},
    "Phi-3.5": {
        **WIDE, "model_type": "phi3", "num_key_value_heads": 4, "sliding_window": 32,
        "rope_scaling": {"type": "longrope", "short_factor": [1, 1.1, 1.2, 1.3], "long_factor": [2, 4, 5, 6.5]},
        "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
    },
    "Phi-4-mini": {
        **WIDE, "model_type": "phi3", "partial_rotary_factor": 0.75, "tie_word_embeddings": True, "full_attn_mod": 1,
        "rope_scaling": {"type": "longrope", "short_factor": [1, 1.1, 1.2], "long_factor": [2, 4, 5.5]},
    },
    "Gemma 2": {
        **GEMMA, "model_type": "gemma2", "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
    },
    "Gemma 3 4B, its text": {
        **GEMMA, "model_type": "gemma3_text", "num_hidden_layers": 3, "sliding_window_pattern": 2,
        "rope_local_base_freq": 100.0, "rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "Pythia": {
        **NEOX, "model_type": "gpt_neox", "hidden_size": 32, "rotary_pct": 0.25, "rotary_emb_base": 10000,
        "use_parallel_residual": True, "hidden_act": "gelu",
    },
    "GPT-2 of Mistral": {
        **GPT2, **NO_DROPOUT, "model_type": "gpt2", "reorder_and_upcast_attn": True, "activation_function": "gelu_new",
        "scale_attn_by_inverse_layer_idx": True, "bos_token_id": 0, "eos_token_id": 0,
    },
    # Without records.
    "SmolLM3": {
        **COMMON, "model_type": "smollm3", "no_rope_layers": [1, 0], "no_rope_layer_interval": 2, "rope_theta": 5e6,
        "tie_word_embeddings": True, "max_window_layers": 2,
    },
    "Granite 3": {
        **COMMON, "model_type": "granite", "attention_multiplier": 0.0156, "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22, "logits_scaling": 8.0,
    },
    "Ministral 3": {
        **COMMON, "model_type": "ministral3", "head_dim": 6,
        "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4, "mscale": 1.0,
            "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0, "rope_theta": 1e6, "llama_4_scaling_beta": 0.1,
        },
    },
    "Command R+": {**COMMON, "model_type": "cohere", "use_qk_norm": True, "logit_scale": 0.83, "layer_norm_eps": 1e-5},
    "OLMo 3": {
        **COMMON, "model_type": "olmo3", "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"],
        "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16},
    },
}  # fmt: skip
# The others are much like these, and slow for being many.
QUICK = (
    "Llama 3.2",
    "YaRN Llama",
    "Phi-4-mini",
    "Gemma 3 4B, its text",
    "Pythia",
    "SmolLM3",
    "Ministral 3",
    "Command R+",
)
NO_STREAM = ("Qwen3", "Gemma 2", "Gemma 3 4B, its text")
CELLS = [
    pytest.param(name, profile, id=f"{name}-{profile}", marks=[] if quick else [pytest.mark.slow])
    for name, fields in HUB.items()
    for profile in PROFILES
    if profile != "shared"
    for quick in [name in QUICK and profile == ("balanced" if fields["model_type"] in FAMILIES else "strict")]
]


@pytest.mark.parametrize(("name", "profile"), CELLS)
def test_a_configuration_of_the_hub_is_exact_or_refused(protect: Any, name: str, profile: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HUB[name]))
    config = load_config(str(tmp_path))
    known = config.model_type in FAMILIES
    reference = adapted(randomize(AutoModelForCausalLM.from_config(config).double().eval()))
    model = copy.deepcopy(reference)
    switches = MONARCH if profile in ("balanced", "strict", "stream") else {}
    refused = profile in ("plain", "balanced", "stream") and not known
    if refused or (profile == "stream" and name in NO_STREAM):
        with pytest.raises(UnsupportedModelError, match="record of the model family" if refused else "cannot run"):
            protect(model, profile=profile)
        return
    ids, mask = padded()
    with wide() if known else contextlib.nullcontext(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*normalized in each head")
        with protect(model, profile=profile, **switches) as run:
            results = []
            for each in (reference, run.model):
                logits = each(input_ids=ids, attention_mask=mask).logits[mask.bool()]
                scalar(logits).backward()
                results.append((logits.detach(), gradients(each)))
            held = run.profile.lora_placement == "worker"
    (expected, wanted), (got, found) = results
    wanted = {path: grad for path, grad in wanted.items() if not (held and "lora_" in path)}
    assert held or len(wanted) > 10
    assert error(got, expected) < EXACT
    assert not wanted or of_gradients(found, wanted) < EXACT
