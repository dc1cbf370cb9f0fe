"""Remote linear layers of `shared`: each call is a product of secret shares, made anew, forward and backward alike."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from obfuscatune.enclave.remote.calls import without_autocast
from obfuscatune.enclave.remote.linear import LinearGroup, Placed
from obfuscatune.enclave.sharing.workers import SharedWeight, Workers


class SharedGroup(LinearGroup):
    """Layers that share one input, side by side in one weight.

    Forward and backward are two products, with the weight's shares and with their transposes, under independent masks;
    the workers keep nothing between them.
    """

    def __init__(self, placed: Placed, widths: Sequence[int], *, workers: Workers, weight: SharedWeight) -> None:
        super().__init__(placed, widths)
        self._workers, self._weight = workers, weight

    def outputs(self, x: Tensor) -> Sequence[Tensor]:
        """Make the call for x ``[..., in]``."""
        y: Tensor = _Product.apply(self.placed.rows(x), self)  # type: ignore[no-untyped-call]
        return torch.split(y, self.widths, dim=-1) if len(self.widths) > 1 else (y,)

    def product(self, x: Tensor, *, transpose: bool) -> Tensor:
        """Return ``x W`` ``[..., out]``, or ``x W^T`` ``[..., in]``, in x's dtype."""
        width = self.placed.key_in.size if transpose else self.placed.key_out.size
        rows = x.reshape(-1, x.shape[-1]).float()
        y = self._workers.product(self._weight, rows, transpose=transpose)
        return y.view(*x.shape[:-1], width).to(x.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: SharedGroup) -> Tensor:
        ctx.group = group
        return group.product(x, transpose=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        with without_autocast():
            return ctx.group.product(grad, transpose=True), None
