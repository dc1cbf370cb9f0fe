"""Products in bfloat16 and float16 on CPUs on which torch's are slower than float32's: in float32, rounded once.

On a CPU without fast ones, torch's own take many times as long: 512 rows by a weight [3072, 768] in bfloat16 245 ms, in
float32 29, and widened here 40 (AMD Zen 3, 1 thread, torch 2.13). The sums are float32 either way. A weight is widened
slab by slab. `protocol/cpu.py` says where this is worth it.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable

# Weights that are widened at a time: 1 MiB of float32, which stays in the cache. For each slab MKL packs all rows anew,
# so that many rows want few slabs: 512 rows by that weight take 13.5 ms in slabs of 1 MiB and 9.1 in slabs of 16, which
# hold all of it (Intel Xeon, 2 threads). From 128 rows on the larger ones are never slower there.
_SLAB, _LARGE_SLAB = 1 << 18, 1 << 22
_MANY_ROWS = 128


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
            for part in _slabs(weight.shape, len(x)):
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
                for part in _slabs(weight.shape, len(dy)):
                    total.addmm_(wide[:, part], weight[part].float())
                dx = total.to(dy.dtype)
            if x is not None:
                dw, of_x = dy.new_empty(dy.shape[1], x.shape[1]), x.float()
                for part in _slabs(dw.shape, len(dy)):
                    dw[part] = wide[:, part].T @ of_x
            if ctx.needs_input_grad[2]:
                db = wide.sum(0).to(dy.dtype)
        return dx, dw, db


def _no_autocast() -> torch.autocast:
    """It would narrow what is widened here."""
    return torch.autocast("cpu", enabled=False)


def _slabs(shape: torch.Size, rows: int) -> list[slice]:
    """Ranges of a weight's rows, for a product with so many rows."""
    step = max(1, (_SLAB if rows < _MANY_ROWS else _LARGE_SLAB) // max(1, shape[1]))
    return [slice(start, start + step) for start in range(0, shape[0], step)]
