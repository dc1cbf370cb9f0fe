"""Options of PEFT's adapters that are known: each is run exactly, or refused by what it makes of the model.

An option of a newer PEFT that is not known here is refused by its name, until somebody has looked at it.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from peft import LoraConfig, PeftType
from torch import nn

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


def refuse_options(configurations: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse options of LoRA that are set and not known.

    Args:
        configurations: PEFT's, by name of the adapter; other kinds of adapters are known by their layers.
        model: that they are of, or will be.

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
        if isinstance(config, LoraConfig) and (options := unknown_options(config, model)):
            made = "target_parameters" in options
            raise UnsupportedModelError(
                "options of LoRA that cannot be run exactly, or that are not known",
                got=", ".join(options),
                expected="plain LoRA (no DoRA, no lora_bias, no other variant)",
                where=f"adapter {name}",
                hint="leave it out; PEFT makes it of gate_proj, up_proj and down_proj where experts have these names"
                if made
                else "leave the option out; what is equal to plain PEFT is listed in docs/models.md",
            )


def unknown_options(config: Any, model: nn.Module) -> list[str]:
    """Return the names of a configuration's options that are not at their defaults, and not `KNOWN`.

    Of types that may have experts, PEFT makes names in ``target_parameters`` of those of layers. If they are of no
    parameter, as where all layers are dense, they have no effect.
    """
    return [
        field.name
        for field in fields(config)
        if field.name not in KNOWN
        and getattr(config, field.name) != _default(field)
        and (field.name != "target_parameters" or _has_any(model, config.target_parameters or ()))
    ]


def _has_any(model: nn.Module, ends: Collection[str]) -> bool:
    """Whether PEFT finds a parameter of one of these names, which may be ends of paths."""
    return any(f".{path}".endswith(f".{end}") for path in _parameter_paths(model) for end in ends)


def _parameter_paths(model: nn.Module) -> Iterator[str]:
    for path, module in model.named_modules():
        names = {name for name, _ in module.named_parameters(recurse=False)}
        if isinstance(module, nn.Linear):  # whose weight may be on the worker
            names |= {"weight", "bias"}
        yield from (f"{path.replace('.base_layer', '')}.{name}" for name in names)


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default
