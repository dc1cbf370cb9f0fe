"""Small models of several families with LoRA, every parameter of them random and telling, norms and biases too."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.pytorch_utils import Conv1D

from obfuscatune.enclave.families import read_decoder

SEED = 20
WIDTH, LAYERS, HEADS, KV_HEADS, HEAD_DIM, NEURONS = 32, 2, 4, 2, 8, 48
_VOCABULARY = 128


def _grouped(kind: type[PretrainedConfig], **more: Any) -> PretrainedConfig:
    """Llama's fields: heads of k and v that serve two query heads each, and a gated MLP."""
    return kind(
        vocab_size=_VOCABULARY, max_position_embeddings=40, hidden_size=WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, intermediate_size=NEURONS,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, **more,
    )  # fmt: skip


def _gpt2() -> PretrainedConfig:
    return GPT2Config(
        vocab_size=_VOCABULARY, n_positions=40, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def _gpt_neox() -> PretrainedConfig:
    """Both parts of a block on one input; half of each head rotated; q, k and v stored head by head."""
    return GPTNeoXConfig(
        vocab_size=_VOCABULARY, max_position_embeddings=40, hidden_size=WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, intermediate_size=2 * NEURONS, rotary_pct=0.5, use_parallel_residual=True,
        hidden_dropout=0.0, attention_dropout=0.0, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip


CONFIGS = {
    "gpt2": _gpt2,
    "llama": lambda: _grouped(LlamaConfig, attention_bias=True, mlp_bias=True),
    "mistral": lambda: _grouped(MistralConfig),
    "qwen2": lambda: _grouped(Qwen2Config),
    "qwen3": lambda: _grouped(Qwen3Config, head_dim=HEAD_DIM),
    "gemma3": lambda: _grouped(Gemma3TextConfig, head_dim=HEAD_DIM, query_pre_attn_scalar=HEAD_DIM),
    "gemma2": lambda: _grouped(Gemma2Config, head_dim=HEAD_DIM, query_pre_attn_scalar=HEAD_DIM),
    "gpt_neox": _gpt_neox,
    "phi3": lambda: _grouped(Phi3Config),
}


def new_model(family: str = "gpt2") -> Any:
    """A model of a family, with LoRA around all its large linear layers."""
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]())
    for parameter in model.parameters():
        if parameter.ndim == 1:  # far from 0, so that nothing with a bias looks like the same without it
            signs = torch.randint(2, parameter.shape) * 2 - 1
            nn.init.uniform_(parameter, 0.3, 0.9).data.mul_(signs)
        else:
            nn.init.normal_(parameter, std=0.1)  # small, so that no neuron is in the range where GELU is the identity
    layers = [layer for block in read_decoder(model).blocks for layer in block.layers]
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=sorted({layer.path.rpartition(".")[2] for layer in layers}),
        init_lora_weights=False,
        fan_in_fan_out=isinstance(layers[0].base, Conv1D),
    )
    return get_peft_model(model, lora).eval()
