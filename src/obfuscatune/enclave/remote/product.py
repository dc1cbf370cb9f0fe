"""Remote linear layers whose forward and backward are two products that the worker cannot tell to belong together."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from obfuscatune.enclave.remote.calls import without_autocast
from obfuscatune.enclave.remote.linear import LinearGroup
from obfuscatune.protocol.derivatives import first_only, origin


class ProductGroup(LinearGroup):
    """Layers that share one input, side by side in one weight W; the worker keeps nothing of a call."""

    def outputs(self, x: Tensor) -> Sequence[Tensor]:
        """Make the call for x ``[..., in]``."""
        rows = self.placed.rows(x)
        y: Tensor = _Product.apply(rows, self, (origin(rows),))  # type: ignore[no-untyped-call]
        return torch.unsafe_split_with_sizes(y, self.widths, dim=-1)

    @abstractmethod
    def product(self, x: Tensor, *, transpose: bool) -> Tensor:
        """Return ``x W`` ``[..., out]``, or ``x W^T`` ``[..., in]``, in x's dtype, from one call."""


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProductGroup, origins: tuple[Tensor]) -> Tensor:
        ctx.group, ctx.origins = group, origins
        return group.product(x, transpose=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        with torch.no_grad(), without_autocast():
            gradient = ctx.group.product(grad.detach(), transpose=True)
        return first_only([gradient], ctx.group.placed.path, grad, *ctx.origins)[0], None, None
