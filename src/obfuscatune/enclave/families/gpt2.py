"""GPT-2: learned positions, LayerNorm with bias, fused q,k,v, weights stored ``[in, out]``, tied or untied head."""

from typing import Any

from obfuscatune.enclave.families.form import AttentionShape
from obfuscatune.enclave.families.spec import FamilySpec


def _attention_shape(config: Any, layer: int) -> AttentionShape:
    head_dim = config.n_embd // config.n_head
    scale = head_dim**-0.5 if config.scale_attn_weights else 1.0
    if config.scale_attn_by_inverse_layer_idx:
        scale /= layer + 1
    return AttentionShape(heads=config.n_head, kv_heads=config.n_head, head_dim=head_dim, scale=scale)


def _refusals(config: Any) -> list[str]:
    return ["add_cross_attention=True: only decoder-only models are covered"] if config.add_cross_attention else []


GPT2 = FamilySpec(
    model_type="gpt2",
    norm="layernorm",
    blocks="transformer.h",
    final_norm="transformer.ln_f",
    attention="attn",
    attention_norm="ln_1",
    first=("c_attn",),
    out="c_proj",
    mlp_norm="ln_2",
    up=("c_fc",),
    down="c_proj",
    gated=False,
    dropout="resid_dropout",
    mlp_dropout="dropout",
    attention_dropout="attn_pdrop",
    attention_shape=_attention_shape,
    activation=lambda config: str(config.activation_function),
    refusals=_refusals,
)
