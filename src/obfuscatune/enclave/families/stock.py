"""Whether what leaves for the worker is stock code: the worker computes that, and never a change made to a module.

A subclass under a known ``model_type``, a ``forward`` set on an instance or on a class of a library, or a hook would be
lost without a word when its module is replaced. Code that stays in the enclave may be changed at will. Other values of
a stock module's attributes are the matter of `made`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2CLS, ACT2FN
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from obfuscatune.enclave.families.empty import refuse_attention
from obfuscatune.enclave.families.form import Block, Part
from obfuscatune.enclave.hooks import own_code, replaced_function, set_on_class
from obfuscatune.errors import UnsupportedModelError
from obfuscatune.profiles import Profile

_STOCK_PACKAGES = ("transformers", "torch", "peft")


def refuse_own_attention(config: Any) -> None:
    """Refuse attention that is not stock, by its name or by what was put into the place of a stock name.

    Fast kernels are installed in either way, and the worker would compute the stock one. Looked at before each pass.
    """
    refuse_attention(config)
    if ALL_ATTENTION_FUNCTIONS.get("sdpa") is not sdpa_attention_forward:
        replaced = 'the function that is registered as "sdpa"'
    elif "eager" in ALL_ATTENTION_FUNCTIONS:
        replaced = 'a function that is registered as "eager"'
    elif functional.scaled_dot_product_attention is not torch._C._nn.scaled_dot_product_attention:
        replaced = "torch.nn.functional.scaled_dot_product_attention"
    else:
        return
    raise UnsupportedModelError(
        "attention that was replaced would be lost where attention is on the worker",
        got=replaced,
        expected="the one of transformers and torch",
        hint="profiles that send linear layers alone (strict, paper) run it in the enclave",
    )


def refuse_replaced_activation(config: Any) -> None:
    """Refuse an activation that was put into the table of ``transformers``: the worker has the stock one."""
    for name in {value for value in config.to_dict().values() if isinstance(value, str)} & set(ACT2CLS):
        if dict.get(ACT2FN, name) != ACT2CLS[name]:
            raise UnsupportedModelError(
                "an activation that was replaced would be lost where the MLP is on the worker",
                got=f'ACT2FN["{name}"]',
                expected="the one of transformers",
                hint="profiles that send linear layers alone (strict, paper) run it in the enclave",
            )


def refuse_changed(blocks: list[Block], profile: Profile) -> None:
    """Refuse blocks whose code differs, where it leaves, from what the worker computes.

    Args:
        blocks: those that leave. profile: as it is run on this model.

    Raises:
        UnsupportedModelError: a class of its own, a forward of one instance or set on a class, or a hook, with the
            module's path.
    """
    for block in blocks:
        for module, path, replaced in _leaving(block, profile):
            if replaced and not type(module).__module__.startswith("transformers.models."):
                got = f"{type(module).__module__}.{type(module).__qualname__}"
                raise _changed("a class of its own", path, got)
            if not replaced and type(module).__module__.split(".")[0] not in _STOCK_PACKAGES:
                got = f"{type(module).__module__}.{type(module).__qualname__}"
                raise _changed("a child with a class of its own", path, got)
            if (own := own_code(module)) is not None:
                raise _changed(own, path)
            if (source := set_on_class(type(module))) is not None:
                raise _changed(f"a forward that was set on {type(module).__qualname__}", path, source)
            if (found := replaced_function(type(module))) is not None:
                raise _changed(f"a function that was replaced, {found[0]}", path, found[1])
            if getattr(module, "is_causal", True) is not True:
                raise _changed("attention in both directions (is_causal=False)", path)


def _changed(what: str, path: str, got: str | None = None) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"a module that leaves for the worker has {what}, which would be lost there",
        got=got,
        expected="stock code of transformers",
        where=path,
        hint="profiles that send linear layers alone (strict, paper) run changed code of attention, MLP and blocks",
    )


def _leaving(block: Block, profile: Profile) -> Iterator[tuple[nn.Module, str, bool]]:
    """Modules of a block that are not called any more, their paths, and whether the worker stands for their code."""
    if profile.rotate_stream:
        yield block.module, block.path, True
        yield from ((module, f"{block.path}.{name}", False) for name, module in block.module.named_modules() if name)
    for part in block.parts:
        if _whole(part, block, profile):
            yield part.module, part.path, True
            yield from ((module, f"{part.path}.{name}", False) for name, module in part.module.named_modules() if name)
        if profile.fold_norms:
            yield part.norm.module, part.norm.path, False
    for layer in block.layers:
        yield layer.base, layer.path, False
        if layer.lora is not None and profile.lora_placement != "enclave":
            yield from ((module, f"{layer.path}.{name}", False) for name, module in layer.lora.named_modules() if name)


def _whole(part: Part, block: Block, profile: Profile) -> bool:
    return (profile.attention if part is block.attention else profile.mlp) == "worker"
