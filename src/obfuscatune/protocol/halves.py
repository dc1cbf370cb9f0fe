"""Products in bfloat16 and float16 on CPUs on which torch has no fast ones: in float32, rounded once.

There torch's own take many times as long as float32's: 512 rows by a weight [3072, 768] in bfloat16 245 ms, in float32
29, and widened here 40 (AMD Zen 3, 1 thread, torch 2.13). The sums are float32 either way. A weight is widened slab by
slab, in the CPU's cache.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable

FEWEST_ROWS = 4  # by that weight they take 1.4 ms widened and 1.9 by torch, two rows 1.1 and 1.0
_SLAB = 1 << 18  # weights that are widened at a time: 1 MiB of float32


def widened_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x W^T + b``, rounded once to x's dtype, for x ``[rows, in]``, weight ``[out, in]``, bias ``[out]``."""
    y: Tensor = _Widened.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y


class _Widened(torch.autograd.Function):
    """Keeps the weight for the gradient as it is, where torch would keep the widened one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        wide, y = x.float(), x.new_empty(x.shape[0], weight.shape[0])
        with _no_autocast():
            for part in _slabs(weight.shape):
                y[:, part] = F.linear(wide, weight[part].float(), None if bias is None else bias[part].float())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wide, dx, dw, db = dy.float(), None, None, None
        with _no_autocast():
            if weight is not None:
                total = wide.new_zeros(dy.shape[0], weight.shape[1])
                for part in _slabs(weight.shape):
                    total.addmm_(wide[:, part], weight[part].float())
                dx = total.to(dy.dtype)
            if x is not None:
                dw, of_x = dy.new_empty(dy.shape[1], x.shape[1]), x.float()
                for part in _slabs(dw.shape):
                    dw[part] = wide[:, part].T @ of_x
            if ctx.needs_input_grad[2]:
                db = wide.sum(0).to(dy.dtype)
        return dx, dw, db


def _no_autocast() -> torch.autocast:
    """It would narrow what is widened here."""
    return torch.autocast("cpu", enabled=False)


def _slabs(shape: torch.Size) -> list[slice]:
    """Ranges of a weight's rows."""
    step = max(1, _SLAB // max(1, shape[1]))
    return [slice(start, start + step) for start in range(0, shape[0], step)]
