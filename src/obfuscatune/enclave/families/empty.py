"""A model of a configuration without data: its modules and shapes, on the meta device."""

import copy
from typing import Any

import torch

from obfuscatune.errors import UnsupportedModelError


def empty_model(config: Any, **options: Any) -> Any:
    """Return the causal language model of a ``transformers`` configuration, in evaluation mode; takes no memory.

    Args:
        options: further arguments of ``AutoModelForCausalLM.from_config``, such as ``dtype``.

    Raises:
        UnsupportedModelError: ``transformers`` has none of that configuration.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                copy.deepcopy(config), trust_remote_code=False, **options
            )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnsupportedModelError(
            "not the configuration of a causal language model that transformers has",
            got=f"{type(config).__name__}, {type(error).__name__}",
            where=str(getattr(config, "model_type", "model_type missing")),
        ) from error
    return model.eval()
