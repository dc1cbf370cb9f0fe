"""A model without an adapter, whose large weights leave: what is left must not be trained as if they were trained too.

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


def refuse_training_of_the_rest(model: nn.Module) -> None:
    """Refuse, before it steps, an optimizer of this process that trains a parameter that a protected model has left."""
    base = {id(p): name for name, p in model.named_parameters()}

    def check(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None and id(p) in base:
                    raise UnsupportedModelError(
                        "all of a model is to be trained, and its large weights are on the worker, frozen",
                        where=base[id(p)],
                        hint="add LoRA before the model is protected; or freeze by then what is not to be trained",
                    )

    weakref.finalize(model, register_optimizer_step_pre_hook(check).remove)
