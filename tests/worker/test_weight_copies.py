"""No product of either side copies a weight: no operation gives anything of a weight's size but views of weights.

It tells by what torch dispatches, not by a clock. The batched product that torch makes of a linear layer with strided
rows expands the weight over the batch first, and that is seen here.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from obfuscatune.enclave.remote.head import FastHead
from obfuscatune.worker.session import WorkerSession

BATCH, PROMPT, D, HEADS, HIDDEN = 2, 3, 128, 4, 256
SMALLEST = D * D  # of all weights; all rows of a call together are smaller
DTYPES = [torch.float32, torch.bfloat16]


class LargeResults(TorchDispatchMode):
    """Notes every result as large as a weight that is not a weight, seen as it is or transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [t for a in args for t in (a if isinstance(a, list | tuple) else [a]) if isinstance(t, Tensor)]
        for tensor in [result] if isinstance(result, Tensor) else result:
            if isinstance(tensor, Tensor) and tensor.numel() >= SMALLEST:
                views = [g for g in given if g.numel() == tensor.numel() and g.data_ptr() == tensor.data_ptr()]
                if not views:
                    self.found.append(f"{func} {list(tensor.shape)}")
        return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("whole", [False, True])
def test_the_worker_copies_no_weight_in_prefill_and_decode(dtype: torch.dtype, whole: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def define(name: str, kind: str, spec: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        session.handle({"op": "define", "segment": name, "kind": kind, "spec": spec}, tensors)

    session = WorkerSession(torch.device("cpu"))
    heads = {"heads": HEADS, "kv_heads": HEADS, "scale": 0.25, "rotary": 0, "softcap": None, "widths": [3 * D]}
    weights = {"first": random(D, 3 * D), "first_bias": random(3 * D), "last": random(D, D)}
    define("attention", "attention", heads, weights)
    gelu = {"activation": "gelu", "gated": False, "widths": [HIDDEN]}
    weights = {"first": random(D, HIDDEN), "first_bias": random(HIDDEN), "last": random(HIDDEN, D)}
    define("plain mlp", "mlp", gelu, weights)
    silu = {"activation": "silu", "gated": True, "widths": [HIDDEN, HIDDEN]}
    define("gated mlp", "mlp", silu, {"first": random(D, 2 * HIDDEN), "last": random(HIDDEN, D)})
    define("linear", "linear", {"widths": [D]}, {"weight": random(D, D)})
    names = ["attention", "plain mlp", "gated mlp", "linear"]
    if whole:
        parts = names[:3]
        define("body", "body", {"parts": parts, "eps": [1e-5] * 3}, {"bias": random(3, D)})
        names = ["body"]
    with LargeResults() as large:
        for step in range(4):
            length, new = (0, PROMPT) if step == 0 else (PROMPT + step - 1, 1)
            for name in names:
                header = {
                    "op": "forward",
                    "segment": name,
                    "cache": {"id": 1, "start": 0, "length": length, "rows": None},
                }
                if name not in {"attention", "body"}:
                    del header["cache"]
                session.handle(header, {"x": random(BATCH, new, D)})
    assert large.found == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4, 40])
def test_the_head_copies_no_weight(dtype: torch.dtype, rows: int) -> None:
    head = FastHead(nn.Linear(D, 140, dtype=dtype))
    with torch.no_grad(), LargeResults() as large:
        head(torch.randn(D, rows, 1, dtype=dtype).permute(1, 2, 0))
    assert large.found == []


def test_the_batched_product_that_copies_is_seen() -> None:
    strided = torch.randn(D, BATCH).T.unsqueeze(1)
    with torch.no_grad(), LargeResults() as large:
        F.linear(strided, torch.randn(D, D))
    assert large.found
