"""Large weights leave a model: what is left must not be trained as if they were trained too.

A script that trains all of a model goes on without an error on what stays, embeddings, head and norms, and ends at
another model. An optimizer's first step tells it from one that reads gradients.
"""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from obfuscatune.enclave.families import Block
from obfuscatune.errors import UnsupportedModelError


def are_frozen(blocks: Iterable[Block]) -> bool:
    """Whether no weight of blocks that are to leave requires a gradient: then whoever froze them may train the rest."""
    return not any(p.requires_grad for block in blocks for layer in block.layers for p in layer.base.parameters())


def refuse_training_of_all(model: nn.Module, *, frozen: bool) -> None:
    """Refuse, before it steps, an optimizer of this process that trains all of a model, of which the most has left.

    Args:
        model: after its weights left. frozen: whether these were frozen before. If not, whatever trains one of the
            other parameters was to train them too. If so, what trains all of the others that were frozen as well.
    """
    names = {id(p): name for name, p in model.named_parameters() if not frozen or not p.requires_grad}

    def check(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        found = [name for number, name in names.items() if number in stepped]
        if found and (not frozen or len(found) == len(names)):
            raise UnsupportedModelError(
                "all of a model is to be trained, and its large weights are on the worker, frozen",
                where=found[0],
                hint="add LoRA, and freeze or unfreeze what stays, before the model is protected",
            )

    weakref.finalize(model, register_optimizer_step_pre_hook(check).remove)
