"""Options of PEFT's adapters that are known: each is run exactly, or refused by what it makes of the model.

An option of a newer PEFT that is not known here is refused by its name, until somebody has looked at it.
"""

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from peft import LoraConfig, PeftType

from obfuscatune.errors import ONLY_INSIDE, UnsupportedModelError

# Of LoraConfig and its bases. That these are equal to plain PEFT, or refused, is for tests/exactness/test_options.py.
KNOWN = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("trainable_token_indices", "ensure_weight_tying"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # values at the start
    *("qalora_group_size", "runtime_config", "megatron_core"),  # nothing without an option that is refused
    *("task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "peft_type"),
    "peft_version",
}

# Values of `init_lora_weights` that draw new factors without a look at the layer's weight.
_DRAWN = (True, False, "gaussian", "eva")


def starts_from_weight(config: LoraConfig) -> bool:
    """Whether PEFT makes the first values of an adapter of the layers' weights, as PiSSA does and OLoRA."""
    return config.init_lora_weights not in _DRAWN


def refuse_options(configurations: Mapping[str, Any]) -> None:
    """Refuse options of LoRA that are set and not known.

    Args:
        configurations: PEFT's, by name of the adapter; other kinds of adapters are known by their layers.

    Raises:
        UnsupportedModelError: naming adapter and options, or the kind of an adapter that builds upon LoRA.
    """
    for name, config in configurations.items():
        if isinstance(config, LoraConfig) and config.peft_type != PeftType.LORA:  # AdaLoRA, whose options are its own
            raise UnsupportedModelError(
                "kind of adapter",
                got=type(config).__name__,
                expected="LoraConfig",
                where=f"adapter {name}",
                hint=ONLY_INSIDE,
            )
        if isinstance(config, LoraConfig) and (options := unknown_options(config)):
            raise UnsupportedModelError(
                "options of LoRA that cannot be run exactly, or that are not known",
                got=", ".join(options),
                expected="plain LoRA (no DoRA, no lora_bias, no other variant)",
                where=f"adapter {name}",
                hint="leave the option out; what is equal to plain PEFT is listed in docs/models.md",
            )


def unknown_options(config: Any) -> list[str]:
    """Return the names of a configuration's options that are not at their defaults, and not `KNOWN`."""
    return [
        field.name
        for field in fields(config)
        if field.name not in KNOWN and getattr(config, field.name) != _default(field)
    ]


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default
