"""Model families: one file of declarations each, the registry by ``config.model_type``, and the normal form."""

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from obfuscatune.enclave.families.empty import refuse_wrapper
from obfuscatune.enclave.families.form import Attention, AttentionShape, Block, Decoder, Group, Layer, Mlp, Norm, Part
from obfuscatune.enclave.families.gemma import GEMMA2, GEMMA3
from obfuscatune.enclave.families.gpt2 import GPT2
from obfuscatune.enclave.families.gpt_neox import GPT_NEOX
from obfuscatune.enclave.families.llama import LLAMA
from obfuscatune.enclave.families.mistral import MISTRAL
from obfuscatune.enclave.families.phi3 import PHI3
from obfuscatune.enclave.families.qwen2 import QWEN2
from obfuscatune.enclave.families.qwen3 import QWEN3
from obfuscatune.enclave.families.shared import refuse_shared
from obfuscatune.enclave.families.spec import FamilySpec, refuse_unless_supported
from obfuscatune.errors import UnsupportedModelError

FAMILIES: dict[str, FamilySpec] = {
    spec.model_type: spec for spec in (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3, GPT_NEOX)
}

__all__ = [
    "FAMILIES",
    "Attention",
    "AttentionShape",
    "Block",
    "Decoder",
    "FamilySpec",
    "Group",
    "Layer",
    "Mlp",
    "Norm",
    "Part",
    "family_of",
    "layer_names",
    "read_decoder",
]


def family_of(config: Any) -> FamilySpec:
    """Return the family's record for a ``transformers`` configuration.

    Raises:
        UnsupportedModelError: the family is not known, or this configuration of it cannot be run exactly.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            "there is no record of this model family",
            got=f"model_type {model_type!r}",
            expected=f"one of {', '.join(FAMILIES)}",
            hint="profiles that send linear layers alone need none: paper, naive, strict, shared",
        )
    spec = FAMILIES[model_type]
    refuse_unless_supported(spec, config)
    return spec


# PEFT refuses `out_proj` of these: their kernels take its weight without a call of the layer.
_MAMBAS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")


def layer_names(model: Any) -> list[str]:
    """Return the names of a model's large linear layers, as PEFT's ``target_modules`` has them.

    Of a model that is not understood, which only profile ``enclave`` runs, they are those of all but its head.
    """
    spec = FAMILIES.get(getattr(model.config, "model_type", ""))
    if spec is not None:
        return sorted(spec.layer_names())
    try:
        names = {_suffix(layer.path) for block in read_decoder(model).blocks for layer in block.layers}
    except UnsupportedModelError:
        head = model.get_output_embeddings()
        names = {
            _suffix(name)
            for name, one in model.named_modules()
            if one is not head and isinstance(one, nn.Linear | Conv1D)
        }
    return sorted(names - {"out_proj"} if model.config.model_type in _MAMBAS else names)


def _suffix(path: str) -> str:
    """The end of a path from its last name on: a number alone, as in a ``Sequential``, would be a block's name too."""
    parts = path.split(".")
    start = max((i for i, part in enumerate(parts) if not part.isdigit()), default=0)
    return ".".join(parts[start:])


def read_decoder(model: Any) -> Decoder:
    """Return a causal language model in normal form: by its family's record, or as its linear layers are discovered.

    Raises:
        UnsupportedModelError: what is in it cannot be run exactly, or is not understood; named.
    """
    refuse_wrapper(model.config)
    model_type = getattr(model.config, "model_type", None)
    if model_type in FAMILIES:
        decoder = FAMILIES[model_type].read(model)
    else:
        from obfuscatune.enclave.families.discovery import discover

        decoder = discover(model)
    refuse_shared(decoder)
    return decoder
