"""Qwen2 and 2.5: as Llama, with biases on q, k and v, and windows on some layers where the configuration says so."""

from obfuscatune.enclave.families.spec import FamilySpec, grouped_heads

QWEN2 = FamilySpec(model_type="qwen2", attention_shape=lambda config, layer: grouped_heads(config))
