"""Remote linear layers whose forward and backward are two products that the worker cannot tell to belong together."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from obfuscatune.enclave.remote.calls import without_autocast
from obfuscatune.enclave.remote.linear import LinearGroup


class ProductGroup(LinearGroup):
    """Layers that share one input, side by side in one weight W; the worker keeps nothing of a call."""

    def outputs(self, x: Tensor) -> Sequence[Tensor]:
        """Make the call for x ``[..., in]``."""
        y: Tensor = _Product.apply(self.placed.rows(x), self)  # type: ignore[no-untyped-call]
        return self.split(y)

    @abstractmethod
    def product(self, x: Tensor, *, transpose: bool) -> Tensor:
        """Return ``x W`` ``[..., out]``, or ``x W^T`` ``[..., in]``, in x's dtype, from one call."""


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProductGroup) -> Tensor:
        ctx.group = group
        return group.product(x, transpose=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        with without_autocast():
            return ctx.group.product(grad, transpose=True), None
