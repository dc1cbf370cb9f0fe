"""Gemma 2 and 3 (text): norms before and after each part, their gain 1 + w; windows on some layers, soft caps."""

from typing import Any

from obfuscatune.enclave.families.form import AttentionShape
from obfuscatune.enclave.families.spec import FamilySpec, grouped_heads


def _attention_shape(config: Any, layer: int) -> AttentionShape:
    return grouped_heads(
        config,
        scale=config.query_pre_attn_scalar**-0.5,
        softcap=config.attn_logit_softcapping,
        head_norms=config.model_type == "gemma3_text",
    )


def _refusals(config: Any) -> list[str]:
    bidirectional = getattr(config, "use_bidirectional_attention", None)
    return ["use_bidirectional_attention: only causal models are covered"] if bidirectional else []


def _spec(model_type: str) -> FamilySpec:
    return FamilySpec(
        model_type=model_type,
        norm="rmsnorm1p",
        attention_norm_after="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_norm_after="post_feedforward_layernorm",
        attention_shape=_attention_shape,
        activation=lambda config: str(config.hidden_activation),
        refusals=_refusals,
    )


GEMMA2, GEMMA3 = _spec("gemma2"), _spec("gemma3_text")
