"""Qwen3: as Llama, with a norm on each head's q and k, and a head width of its own."""

from obfuscatune.enclave.families.spec import FamilySpec, grouped_heads

QWEN3 = FamilySpec(model_type="qwen3", attention_shape=lambda config, layer: grouped_heads(config, head_norms=True))
