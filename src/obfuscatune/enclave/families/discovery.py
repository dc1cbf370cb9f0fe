"""Any other causal language model whose blocks are made of ``nn.Linear``: its linear layers, found by running it once.

The model is run on tensors without data (the meta device), and what enters each linear layer is written down: layers
that get the very same tensor travel in one call. That is all that profiles need that send linear layers alone; what is
between the layers stays the model's own code, in the enclave. What is not understood is refused, by name.
"""

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from obfuscatune.enclave.families.form import Block, Decoder, Group, Layer, find_layer
from obfuscatune.enclave.families.trace import trace
from obfuscatune.errors import ONLY_INSIDE, UNQUANTIZED, UnsupportedModelError

# Short convolutions and the numbers of a state space stay in the enclave. They are at most this much of what a block's
# linear layers have; where it is more, a user would wonder how little has left.
STAYS = 0.05


def discover(model: Any) -> Decoder:
    """Return a causal language model in normal form, its attention and MLP not known.

    Raises:
        UnsupportedModelError: no list of blocks; experts, quantized or shared weights, a layer that is not called once.
    """
    config = model.config
    where = str(getattr(config, "model_type", type(model).__name__))
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            "a quantized model", expected="plain floating-point weights", where=where, hint=UNQUANTIZED
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            "an encoder-decoder model", expected="a causal language model", where=where, hint=ONLY_INSIDE
        )
    path, blocks = _find_blocks(model, where)
    names = [_linear_names(block, f"{path}.{i}") for i, block in enumerate(blocks)]
    inputs = trace(model, [f"{path}.{i}.{name}" for i, found in enumerate(names) for name in found], where)
    found = []
    for i, block in enumerate(blocks):
        layers = {name: find_layer(block, name, f"{path}.{i}") for name in names[i]}
        found.append(Block(i, f"{path}.{i}", block, _groups(layers, inputs)))
    return Decoder(model, where, False, path, found)


def _find_blocks(model: nn.Module, where: str) -> tuple[str, list[nn.Module]]:
    count = getattr(model.config, "num_hidden_layers", None)
    lists = [
        (name, list(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and 0 < len(module) == count and all(map(_has_linear, module))
    ]
    outer = [(name, blocks) for name, blocks in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    if len(outer) != 1:
        got = ", ".join(name for name, _ in outer) or "none"
        expected = f"one list of the configuration's {count} decoder blocks, made of linear layers"
        raise UnsupportedModelError(
            "decoder blocks cannot be found", got=got, expected=expected, where=where, hint=ONLY_INSIDE
        )
    return outer[0]


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Linear | Conv1D) for child in module.modules())


def _linear_names(block: nn.Module, where: str) -> list[str]:
    """Paths of the block's linear layers; PEFT's layer around one counts as the layer."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    names: list[str] = []
    stays: dict[str, torch.Size] = {}
    linear = 0
    for name, module in block.named_modules():
        if any(name.startswith(f"{outer}.") for outer in names):
            continue  # what is within PEFT's layer
        path = f"{where}.{name}" if name else where
        if isinstance(module, nn.ModuleList) and name and _has_linear(module):
            raise UnsupportedModelError("a list of modules in a block, such as experts", where=path, hint=ONLY_INSIDE)
        if isinstance(module, nn.Linear | Conv1D | BaseTunerLayer):
            names.append(name)
            linear += sum(parameter.numel() for _, parameter in block.get_submodule(name).named_parameters())
        elif not isinstance(module, nn.Embedding) and not _is_norm(module):
            own = module.named_parameters(recurse=False)
            stays |= {f"{path} {name}": parameter.shape for name, parameter in own if parameter.ndim > 1}
    _require_small(stays, linear)
    return names


def _require_small(stays: dict[str, torch.Size], linear: int) -> None:
    """Refuse weights of other kinds that would make the enclave large, as those of experts; see `STAYS`.

    Args:
        stays: their shapes, by path and name. linear: how many numbers the block's linear layers have.
    """
    if sum(shape.numel() for shape in stays.values()) > STAYS * linear:
        largest = max(stays, key=lambda name: stays[name].numel())
        path, name = largest.split(" ")
        raise UnsupportedModelError(
            "weights that are not those of a linear layer",
            got=f"{name} {list(stays[largest])}",
            where=path,
            hint=ONLY_INSIDE,
        )


def _is_norm(module: nn.Module) -> bool:
    """One of transformers, which stays in the enclave; that of all heads has a row for each (Command R+)."""
    return type(module).__module__.startswith("transformers.models.") and type(module).__name__.endswith("Norm")


def _groups(layers: dict[str, Layer], inputs: dict[str, int]) -> tuple[Group, ...]:
    """Layers by the tensor that enters them, in the order in which the block has them."""
    by_input: dict[int, list[Layer]] = {}
    for layer in layers.values():
        by_input.setdefault(inputs[layer.path], []).append(layer)
    return tuple(
        Group(tuple(group), None, f"{i} in", f"{i} out", inner_in=False, inner_out=False)
        for i, group in enumerate(by_input.values())
    )
