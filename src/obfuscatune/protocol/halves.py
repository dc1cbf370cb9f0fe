"""Products in bfloat16 and float16 on CPUs that have no instructions for them: in float32, rounded once.

There torch's own product of half dtypes takes eight times as long as float32's: 512 rows by [3072, 768] in bfloat16
245 ms, in float32 29, and widened here 40 (AMD Zen 3, 1 thread, torch 2.13). The sums are float32 either way. A weight
is widened slab by slab, in the CPU's cache.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable

FEWEST_ROWS = 4  # for which it is worth it: they take 1.4 ms and 1.9 by torch; two rows 1.1 and 1.0
_SLAB = 1 << 18  # weights that are widened at a time: 1 MiB of float32


@cache
def has_products(dtype: torch.dtype) -> bool:
    """Say whether this CPU multiplies in that dtype as fast as in float32."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype != torch.float16 or bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def widened_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x W^T + b``, rounded once to x's dtype, for x ``[rows, in]``, weight ``[out, in]``, bias ``[out]``."""
    y: Tensor = _Widened.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y


class _Widened(torch.autograd.Function):
    """Keeps the weight for the gradient as it is; torch would keep the widened one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        wide, y = x.float(), x.new_empty(x.shape[0], weight.shape[0])
        with torch.autocast("cpu", enabled=False):  # which would narrow them again
            for part in _slabs(weight):
                y[:, part] = F.linear(wide, weight[part].float(), None if bias is None else bias[part].float())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wide, dx, dw, db = dy.float(), None, None, None
        if ctx.needs_input_grad[0]:
            total = wide.new_zeros(dy.shape[0], weight.shape[1])
            for part in _slabs(weight):
                total.addmm_(wide[:, part], weight[part].float())
            dx = total.to(dy.dtype)
        if ctx.needs_input_grad[1]:
            dw = (wide.T @ x.float()).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            db = wide.sum(0).to(dy.dtype)
        return dx, dw, db


def _slabs(weight: Tensor) -> list[slice]:
    """Ranges of the weight's rows."""
    step = max(1, _SLAB // max(1, weight.shape[1]))
    return [slice(start, start + step) for start in range(0, weight.shape[0], step)]
