"""The product with a weight, with a faster way for the few rows of a decoding step; both sides use it.

Rows always go to torch as a contiguous matrix. A product of three dimensions, without a bias and with other strides,
becomes a batched one, for which torch copies the weight once for every row of the batch.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from obfuscatune.protocol.cpu import is_intel, widened_from
from obfuscatune.protocol.halves import widened_linear
from obfuscatune.protocol.threads import threads_for

# Up to so many rows a product costs the reading of the weight alone, and a CPU reads a tall float32 one faster as the
# left factor. For 4 rows and a cold weight [3072, 768], W x^T takes .43 ms and x W^T .80 ms; [2304, 768]: .35 and .65;
# [768, 768]: .11 and .20. A wide one is slower so, [768, 3072]: 1.2 and .72. From 8 rows on all are equal. In bfloat16
# x W^T is always faster, [3072, 768]: .70 and .36 (AMD EPYC, 1 thread, torch 2.13). On Intel's CPUs it is so in float32
# too: 4 rows by the weights of GPT-2 small's blocks 25 ms and 29, 1 row by its head 5.4 and 12 (Intel Xeon, 2 threads).
FEW_ROWS = 8


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x W^T + b`` for x ``[..., in]``, weight ``[out, in]``, bias ``[out]``: what ``F.linear`` returns.

    The result is contiguous, and so are the rows that are multiplied: for rows of other strides torch may make a
    batched product of it, with a copy of the weight for every row of the batch.
    """
    shape, rows = (*x.shape[:-1], weight.shape[0]), x.shape[:-1].numel()
    flat = x.reshape(rows, x.shape[-1]).contiguous()
    with threads_for(rows * weight.numel()):
        if _left_factor(weight, rows) and not torch.is_grad_enabled():
            few = flat if rows > 1 else flat.expand(2, -1)  # one row alone would get the slower matrix-vector kernel
            y = weight @ few.T if bias is None else torch.addmm(bias.unsqueeze(1), weight, few.T)
            return y.T[:rows].reshape(shape).contiguous()
        if _is_faster_widened(flat, weight):
            return widened_linear(flat, weight, bias).view(shape)
        return F.linear(flat, weight, bias).view(shape)


def _left_factor(weight: Tensor, rows: int) -> bool:
    """Whether the weight is faster as the left factor of so many rows; see `FEW_ROWS`."""
    tall = weight.shape[0] >= weight.shape[1]
    few = tall and 0 < rows <= FEW_ROWS and weight.is_cpu and weight.dtype.itemsize > 2
    return few and not is_intel()


def _is_faster_widened(x: Tensor, weight: Tensor) -> bool:
    """Whether so many rows of one half dtype are faster in float32 on this CPU, and autocast asks for no other."""
    if x.dtype != weight.dtype or not weight.is_cpu:
        return False
    fewest = widened_from(weight.dtype)
    if fewest is None or len(x) < fewest[0] or min(weight.shape) < fewest[1]:
        return False
    return not torch.is_autocast_enabled("cpu") or torch.get_autocast_dtype("cpu") == weight.dtype
