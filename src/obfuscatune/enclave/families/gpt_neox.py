"""GPT-NeoX and Pythia: LayerNorm, both parts of a block on the same input, rotary over a part of each head.

q, k and v are fused and stored head by head.
"""

from typing import Any

from obfuscatune.enclave.families.form import AttentionShape
from obfuscatune.enclave.families.spec import FamilySpec, interleaved, partial_rotary


def _attention_shape(config: Any, layer: int) -> AttentionShape:
    heads = config.num_attention_heads
    head_dim = config.hidden_size // heads
    rotary = partial_rotary(head_dim, config.rope_parameters)
    return AttentionShape(heads=heads, kv_heads=heads, head_dim=head_dim, scale=head_dim**-0.5, rotary=rotary)


GPT_NEOX = FamilySpec(
    model_type="gpt_neox",
    norm="layernorm",
    blocks="gpt_neox.layers",
    final_norm="gpt_neox.final_layer_norm",
    attention="attention",
    first=("query_key_value",),
    out="dense",
    up=("dense_h_to_4h",),
    down="dense_4h_to_h",
    gated=False,
    block_dropouts=("post_attention_dropout", "post_mlp_dropout"),
    attention_shape=_attention_shape,
    columns=lambda config: interleaved(config.num_attention_heads, config.hidden_size // config.num_attention_heads),
    parallel=lambda config: bool(config.use_parallel_residual),
)
