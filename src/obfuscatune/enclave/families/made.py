"""Whether the parts that the worker stands for are as their configuration makes them.

The worker gets numbers of the configuration: heads, scale, soft cap, activation. Code may have set others on a module,
or changed the configuration after the model was made of it, and plain PyTorch heeds what is on the module. So each such
part is compared with one that its class makes of the configuration, on the meta device.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from obfuscatune.enclave.families.form import Block, Decoder
from obfuscatune.errors import UnsupportedModelError
from obfuscatune.profiles import Profile

_PLAIN = (bool, int, float, str, tuple, type(None))
# Of a run, of a place in the list of blocks, and what `protect` warns of by itself.
_OTHERWISE = ("training", "gradient_checkpointing", "layer_idx")


def refuse_other_values(decoder: Decoder, blocks: list[Block], profile: Profile) -> None:
    """Refuse parts, or whole blocks, that leave and have other values than the configuration says.

    Args:
        decoder: of a family with a record, its code stock. blocks: those that leave. profile: as it is run.

    Raises:
        UnsupportedModelError: with the module's path, the name of the value, and both values.
    """
    for block in blocks:
        whole = [part for part in block.parts if profile.rotate_stream or _is_whole(part is block.attention, profile)]
        if not whole:
            continue
        made = _made(block, decoder.model.config)
        if profile.rotate_stream:
            _compare(block.module, made, block.path, {part.name for part in whole})
        for part in whole:
            _compare(part.module, made.get_submodule(part.name), part.path, {layer.name for layer in part.layers})


def _is_whole(attention: bool, profile: Profile) -> bool:
    return (profile.attention if attention else profile.mlp) == "worker"


def _made(block: Block, config: Any) -> nn.Module:
    """A block as ``transformers`` makes it, without weights. Of a subclass that stays, what it is a subclass of."""
    for kind in type(block.module).__mro__:
        if kind.__module__.startswith("transformers.models."):
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                made: nn.Module = kind(config, layer_idx=block.index)
                return made
    raise UnsupportedModelError(
        "a block that is none of transformers'",
        got=type(block.module).__qualname__,
        where=block.path,
        hint="profiles that send linear layers alone (strict, paper) run changed code of blocks",
    )


def _compare(module: nn.Module, made: nn.Module, path: str, apart: set[str]) -> None:
    """Raise where a module differs from one that was made; ``apart``: children that are looked at elsewhere."""
    for name, expected in _values(made):
        got = module.__dict__.get(name)
        if not _same(got, expected):
            raise _other(f"{path}.{name}", got, expected)
    for name, child in made.named_children():
        if name in apart or _is_norm(child):
            continue
        there = module._modules.get(name)
        if there is None or type(there) is not type(child):
            raise _other(f"{path}.{name}", there, child)
        _compare(there, child, f"{path}.{name}", set())


def _values(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        # A dropout is switched off where it leaves, with a warning that has the value on the module.
        if name.startswith("_") or name in _OTHERWISE or "dropout" in name or isinstance(module, nn.Dropout):
            continue
        if isinstance(value, _PLAIN) or callable(value):
            yield name, value


def _is_norm(module: nn.Module) -> bool:
    """One whose values are read off the module itself."""
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")


def _same(got: Any, expected: Any) -> bool:
    if isinstance(expected, partial):
        same_call = isinstance(got, partial) and (got.args, got.keywords) == (expected.args, expected.keywords)
        return same_call and _same(got.func, expected.func)
    if callable(expected):
        return getattr(got, "__func__", got) is getattr(expected, "__func__", expected)
    return type(got) is type(expected) and bool(got == expected)


def _other(path: str, got: Any, expected: Any) -> UnsupportedModelError:
    def told(value: Any) -> Any:
        return value if isinstance(value, _PLAIN) else getattr(value, "__name__", type(value).__name__)

    return UnsupportedModelError(
        "a part that leaves for the worker is not as its configuration makes it, and the worker goes by that",
        got=told(got),
        expected=told(expected),
        where=path,
        hint="set it in the configuration that the model is made of; strict and paper run the module as it is",
    )
