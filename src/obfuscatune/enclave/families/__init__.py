"""Model families: one file each, and the registry by ``config.model_type``."""

from typing import Any

from obfuscatune.enclave.families.gpt2 import GPT2
from obfuscatune.enclave.families.spec import AttentionShape, FamilySpec, refuse_unless_supported
from obfuscatune.errors import UnsupportedModelError

FAMILIES: dict[str, FamilySpec] = {spec.model_type: spec for spec in (GPT2,)}

__all__ = ["FAMILIES", "AttentionShape", "FamilySpec", "family_of"]


def family_of(config: Any) -> FamilySpec:
    """Return the family's record for a ``transformers`` configuration.

    Raises:
        UnsupportedModelError: the family is not known, or this configuration of it cannot be run exactly.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            "this model family is not supported yet",
            got=f"model_type {model_type!r}",
            expected=f"one of {', '.join(FAMILIES)}",
            hint="a family is one file of declared roles in obfuscatune/families",
        )
    spec = FAMILIES[model_type]
    refuse_unless_supported(spec, config)
    return spec
