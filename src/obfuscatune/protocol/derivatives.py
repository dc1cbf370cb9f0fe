"""First derivatives alone: a second one is refused by name.

Nodes whose backward is computed elsewhere, or by a formula of its own, give gradients that cannot be differentiated
again. Torch's ``once_differentiable`` ends that in an error that tells neither a layer nor a way out. Where
``autograd.grad`` is for some inputs it ends in none: its node leads to no input, and the term is left out.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from obfuscatune.errors import UnsupportedModelError


def origin(*tensors: Tensor) -> Tensor:
    """Return an empty tensor that depends on these in the graph, and keeps none of them in memory."""
    found: Tensor = _Origin.apply(*tensors)  # type: ignore[no-untyped-call]
    return found


def first_only(gradients: Sequence[Tensor | None], where: str, *sources: Tensor | None) -> list[Tensor | None]:
    """Return gradients that may be used, and not differentiated; as they are, unless ``create_graph=True`` is given.

    Args:
        gradients: computed under ``no_grad``. where: what computed them, for the message.
        sources: what they depend on.
    """
    if not torch.is_grad_enabled():
        return list(gradients)
    known = [source for source in sources if source is not None]
    return [None if g is None else _FirstOnly.apply(g, where, *known) for g in gradients]  # type: ignore[no-untyped-call]


class _Origin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        return tensors[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("nothing is computed of an origin")


class _FirstOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, where: str, *sources: Tensor) -> Tensor:
        ctx.where = where
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise UnsupportedModelError(
            "a second derivative of a protected model",
            where=ctx.where,
            hint="gradient penalties and Hessians need the plain model; create_graph=True alone changes nothing",
        )
