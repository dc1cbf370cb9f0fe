"""Phi-3 and 4-mini: as Llama, with fused q,k,v and fused gate,up; rotary over a part of each head where it says so."""

from typing import Any

from obfuscatune.enclave.families.form import AttentionShape
from obfuscatune.enclave.families.spec import FamilySpec, grouped_heads, partial_rotary


def _attention_shape(config: Any, layer: int) -> AttentionShape:
    shape = grouped_heads(config)
    return grouped_heads(config, rotary=partial_rotary(shape.head_dim, config.rope_parameters))


PHI3 = FamilySpec(
    model_type="phi3",
    first=("qkv_proj",),
    up=("gate_up_proj",),
    block_dropouts=("resid_attn_dropout", "resid_mlp_dropout"),
    attention_shape=_attention_shape,
)
