"""The acts of replacing what has left: a linear layer, or a whole part."""

import torch
from torch import nn

from obfuscatune.enclave.families import Layer, Part
from obfuscatune.enclave.remote.withdrawn import Withdrawn


def standins(part: Part) -> dict[str, nn.Module]:
    """What stands for the children of a part that has left, under their names and in their order.

    PEFT's layers stay, so that the adapter's parameters keep their names, and an optimizer's state their order; whoever
    looks for another layer is told. Dropouts stand too, and are not called, but for the one on the part's output.
    """
    layers = {layer.name: Withdrawn(layer.path) if layer.lora is None else layer.lora for layer in part.layers}
    dropouts = {
        name: child
        for name, child in part.module._modules.items()
        if isinstance(child, nn.Dropout) and child is not part.dropout
    }
    standing = layers | dropouts
    return {name: standing[name] for name in part.module._modules if name in standing}


def _replace_base(layer: Layer, remote: nn.Module) -> None:
    """Put ``remote`` under PEFT's layer, which asks the base layer's weight for what is not here any more."""
    # Closures over the layer itself would keep its plain weight in memory.
    here, dtype = torch.device("cpu"), layer.base.weight.dtype
    layer.lora.base_layer = remote
    # Of an adapter that is added later; without a weight to go by, PEFT would leave it in float32.
    layer.lora._get_base_layer_device_and_dtype = lambda _: (here, dtype)


def replace_linear(layer: Layer, remote: nn.Module, *, with_lora: bool) -> None:
    """Put ``remote`` in the layer's place; ``with_lora``: its call computes the LoRA too."""
    if layer.lora is None:
        setattr(layer.parent, layer.name, remote)
        return
    _replace_base(layer, remote)
    if with_lora:
        # PEFT's layer stays, with its parameters, names and switches; only what it computes is done in one remote call.
        layer.lora.forward = remote.forward


def replace_part(parent: nn.Module, name: str, remote: nn.Module, layers: tuple[Layer, ...]) -> None:
    """Put ``remote`` in the place of the child ``name`` of ``parent``, whose linear layers are ``layers``."""
    for layer in layers:
        if layer.lora is not None:
            _replace_base(layer, Withdrawn(layer.path))
    setattr(parent, name, remote)
