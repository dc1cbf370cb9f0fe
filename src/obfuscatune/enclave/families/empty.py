"""A model of a configuration without data: its modules and shapes, on the meta device."""

import copy
from typing import Any

import torch

from obfuscatune.errors import OWN_CONFIG, UnsupportedModelError


def empty_model(config: Any, kind: Any = None, **options: Any) -> Any:
    """Return the causal language model of a ``transformers`` configuration, in evaluation mode; takes no memory.

    Args:
        kind: its class. None for that of ``AutoModelForCausalLM``, which has none for the configuration of some models
            that are a part of a larger one.
        options: further arguments of ``AutoModelForCausalLM.from_config``, such as ``dtype``.

    Raises:
        UnsupportedModelError: ``transformers`` has none of that configuration, or it asks for foreign code.
    """
    from transformers import AutoModelForCausalLM

    refuse_wrapper(config)
    if "attn_implementation" not in options:
        refuse_attention(config)
    try:
        with torch.device("meta"):
            config = copy.deepcopy(config)
            if kind is None:
                model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                    config, trust_remote_code=False, **options
                )
            else:
                model = kind._from_config(config, **options)
    except Exception as error:  # a width of zero, an activation that nobody has, ... each fails in its own way
        raise UnsupportedModelError(
            "not the configuration of a causal language model that transformers has",
            got=f"{type(config).__name__}, {type(error).__name__}",
            where=str(getattr(config, "model_type", "model_type missing")),
            hint=OWN_CONFIG,
        ) from error
    return model.eval()


def refuse_attention(config: Any) -> None:
    """Refuse an implementation of attention that is neither of the stock ones.

    A file may ask for one by its name, from the hub too, and a program may register its own, which the worker would not
    compute.
    """
    if getattr(config, "_attn_implementation", None) not in (None, "eager", "sdpa"):
        raise UnsupportedModelError(
            "attention of the model's configuration",
            expected="eager or sdpa",
            hint='model.set_attn_implementation("sdpa"), or _attn_implementation in the file',
        )


def text_alone(config: Any) -> Any:
    """Return the configuration of the model that ``AutoModelForCausalLM`` makes of one.

    Of some models that take pictures too, Qwen3.5 for one, it takes the part of texts and leaves out the rest. Others
    it makes whole; their configuration is returned as it is.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING as KINDS

    kind = KINDS.get(type(config), None)
    text = config.sub_configs.get("text_config")
    if text is None or getattr(kind, "config_class", None) is not text:
        return config
    found = config.get_text_config()
    if getattr(config, "quantization_config", None) is not None:
        found.quantization_config = config.quantization_config  # of the weights, and refused
    return found


def refuse_wrapper(config: Any) -> None:
    """Refuse the configuration of a model around a model of texts: one that takes pictures or sounds besides.

    Raises:
        UnsupportedModelError: naming both kinds of models.
    """
    inner = [name for name in ("text_config", "thinker_config", "decoder") if getattr(config, name, None) is not None]
    if inner and not getattr(config, "is_encoder_decoder", False):
        held = getattr(getattr(config, inner[0]), "model_type", inner[0])
        raise UnsupportedModelError(
            "a model that takes pictures or sounds besides text",
            got=f"model_type {getattr(config, 'model_type', None)!r}, around {held!r}",
            expected="a causal language model of texts",
            hint="take its language model alone: docs/models.md has the four lines for it",
        )
