"""Mistral: as Llama, with a window of attention or without; the window comes with the mask."""

from obfuscatune.enclave.families.spec import FamilySpec, grouped_heads

MISTRAL = FamilySpec(model_type="mistral", attention_shape=lambda config, layer: grouped_heads(config))
