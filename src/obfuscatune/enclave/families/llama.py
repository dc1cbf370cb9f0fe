"""Llama, 1 to 3.x: RMSNorm, rotary positions with any of ``transformers``' scalings, grouped kv heads, gated MLP."""

from obfuscatune.enclave.families.spec import FamilySpec, grouped_heads

LLAMA = FamilySpec(model_type="llama", attention_shape=lambda config, layer: grouped_heads(config))
