"""Tiny random models of every family, and of some without a record, with nothing trivial in them."""

import copy
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OlmoConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
    Starcoder2Config,
)

from .models import VOCABULARY, randomize_lora

WIDTH = 20
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 27,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
WINDOW = 4  # shorter than the rows
MIXED = ["sliding_attention", "full_attention"]
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
ODD = {**PARTIAL, "partial_rotary_factor": 0.4}  # 3 of 8: stock code rotates 4
HEADS = {"head_dim": 6}  # times 4 is not the width

# Name -> configuration. Everything that a family's record distinguishes is in one of them.
RECORDED: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=WIDTH, n_head=4, n_layer=2, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    ),
    "llama": lambda: LlamaConfig(**COMMON, head_dim=6),
    "llama, biases, tied": lambda: LlamaConfig(
        **COMMON, head_dim=6, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama, yarn": lambda: LlamaConfig(**COMMON, head_dim=6, rope_parameters=YARN),
    "llama, llama3": lambda: LlamaConfig(**COMMON, head_dim=6, rope_parameters=LLAMA3),
    "llama, linear": lambda: LlamaConfig(
        **COMMON, head_dim=6, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
    ),
    "llama, dynamic": lambda: LlamaConfig(
        **{**COMMON, "max_position_embeddings": 8},
        head_dim=6,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    ),
    "mistral": lambda: MistralConfig(**COMMON, head_dim=6, sliding_window=None),
    "mistral, window": lambda: MistralConfig(**COMMON, head_dim=6, sliding_window=WINDOW),
    "qwen2": lambda: Qwen2Config(**{**COMMON, "hidden_size": 24}),
    "qwen2, windows on some layers": lambda: Qwen2Config(
        **{**COMMON, "hidden_size": 24}, use_sliding_window=True, sliding_window=WINDOW, layer_types=MIXED
    ),
    "qwen3": lambda: Qwen3Config(**COMMON, **HEADS),
    "gemma2": lambda: Gemma2Config(
        **COMMON, **HEADS, query_pre_attn_scalar=7, sliding_window=WINDOW, layer_types=MIXED, attn_logit_softcapping=2.0
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **COMMON, **HEADS, query_pre_attn_scalar=7, sliding_window=WINDOW, layer_types=MIXED
    ),
    "phi3": lambda: Phi3Config(**{**COMMON, "hidden_size": 24}, resid_pdrop=0.0, embd_pdrop=0.0),
    "phi3, partial rotary, window": lambda: Phi3Config(
        **{**COMMON, "hidden_size": 32}, resid_pdrop=0.0, embd_pdrop=0.0, rope_parameters=ODD, sliding_window=WINDOW
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**_neox(), use_parallel_residual=True),
    "gpt_neox, one part after the other": lambda: GPTNeoXConfig(**_neox(), use_parallel_residual=False),
}  # fmt: skip
SQUARE = {**COMMON, "hidden_size": 24}  # heads that are as wide together as the model
UNRECORDED: dict[str, Callable[[], Any]] = {
    "olmo2": lambda: Olmo2Config(**SQUARE),
    "olmo": lambda: OlmoConfig(**SQUARE, clip_qkv=0.5),  # changes q, k and v in place
    "granite": lambda: GraniteConfig(**SQUARE),
    "stablelm": lambda: StableLmConfig(**{**COMMON, "hidden_size": 32}),
    "cohere": lambda: CohereConfig(**SQUARE),
    "starcoder2": lambda: Starcoder2Config(**SQUARE, residual_dropout=0.0, embedding_dropout=0.0),
}


def _neox() -> dict[str, Any]:
    kept = {name: value for name, value in COMMON.items() if name != "num_key_value_heads"}
    return {**kept, "hidden_size": 24, "rope_parameters": {**PARTIAL, "partial_rotary_factor": 0.4}}


def model_of(name: str, *, dtype: torch.dtype = torch.float64, lora: bool = True, seed: int = 0, **options: Any) -> Any:
    """A model without dropout, every parameter of it random; ``options`` are LoRA's."""
    config = {**RECORDED, **UNRECORDED}[name]()
    model = randomize(AutoModelForCausalLM.from_config(config).to(dtype).eval(), seed)
    return adapted(model, **options) if lora else model


def randomize(model: Any, seed: int = 0) -> Any:
    """Give the model random parameters and return it; some gains of norms are tiny or negative."""
    generator = torch.Generator().manual_seed(seed)
    gain = 0.0 if "gemma" in model.config.model_type else 1.0
    for path, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.ndim == 1 and path.endswith("weight"):
            noise = gain + 0.5 * noise
            noise[0], noise[1] = noise[0] * 1e-3, -noise[1].abs()
        else:
            noise *= 1.6 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.4  # as large sums at every width
        parameter.data.copy_(noise)
    return model


def adapted(model: Any, **options: Any) -> Any:
    """A PEFT model of rank 3 around the model, on all linear layers unless told, both factors random."""
    dtype = next(model.parameters()).dtype
    more = {"fan_in_fan_out": True} if model.config.model_type in ("gpt2", "openai-gpt") else {}
    config = LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": "all-linear", **more, **options})
    peft_model = get_peft_model(model, config).to(dtype).eval()
    randomize_lora(peft_model, seed=1)
    return peft_model


def twins_of(name: str, **options: Any) -> tuple[Any, Any]:
    """Two equal models: one to protect, one to compare it with."""
    model = model_of(name, **options)
    return copy.deepcopy(model), model


def _stock(forward: Any, kind: type[nn.Module]) -> Any:
    """That code as if it were written beside the class: `protect` refuses what another package has put there."""
    return types.FunctionType(forward.__code__, vars(sys.modules[kind.__module__]))


@contextmanager
def wide() -> Iterator[None]:
    """Let stock norms, and the softmax of stock eager attention, compute in the dtype of what they get.

    ``transformers`` computes them in float32 even in a float64 model. Where norms are folded, and on the worker, ours
    compute in float64, so that only so can the two be compared to float64 precision.
    """
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm
    from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    def norm(self: Any, x: Tensor) -> Tensor:
        rows = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * rows

    def norm_of_gemma(self: Any, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)

    softmax = nn.functional.softmax
    with pytest.MonkeyPatch.context() as patch:
        for kind in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, Phi3RMSNorm):
            patch.setattr(kind, "forward", _stock(norm, kind))
        for kind in (Gemma2RMSNorm, Gemma3RMSNorm):
            patch.setattr(kind, "forward", _stock(norm_of_gemma, kind))
        patch.setattr(nn.functional, "softmax", lambda x, dim=-1, dtype=None, **more: softmax(x, dim=dim))
        yield
