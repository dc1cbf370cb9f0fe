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

from obfuscatune.enclave.keys import MasterSecret, build
from obfuscatune.enclave.remote.head import FastHead
from obfuscatune.protocol import halves
from obfuscatune.worker.session import WorkerSession

BATCH, PROMPT, D, HEADS, HIDDEN = 2, 3, 128, 4, 256
SMALLEST = D * D  # of all weights; all rows of a call together are smaller
DTYPES = [torch.float32, torch.bfloat16]
PARTS = ["attention", "grouped attention", "plain mlp", "gated mlp"]


@pytest.fixture(autouse=True)
def _slabs_smaller_than_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are in a model, where the CPU multiplies no bfloat16."""
    monkeypatch.setattr(halves, "_SLAB", SMALLEST // 2)


class LargeResults(TorchDispatchMode):
    """Notes every result as large as a weight that is not a weight, or a part of one, seen in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [t for a in args for t in (a if isinstance(a, list | tuple) else [a]) if isinstance(t, Tensor)]
        for tensor in [result] if isinstance(result, Tensor) else result:
            if isinstance(tensor, Tensor) and tensor.numel() >= SMALLEST:
                storage = tensor.untyped_storage().data_ptr()
                if not any(g.untyped_storage().data_ptr() == storage for g in given):
                    self.found.append(f"{func} {list(tensor.shape)}")
        return result


@pytest.fixture(params=DTYPES, ids=str)
def worker(request: pytest.FixtureRequest) -> "Worker":
    return Worker(request.param)


class Worker:
    """A session with a segment of each kind."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.session, self.calls = dtype, WorkerSession(torch.device("cpu")), 0
        self.generator = torch.Generator().manual_seed(0)
        for name, kv_heads, rotary in (("attention", HEADS, 0), ("grouped attention", HEADS // 2, D // HEADS)):
            heads = {"heads": HEADS, "kv_heads": kv_heads, "scale": 0.25, "rotary": rotary, "softcap": None}
            width = D * (HEADS + 2 * kv_heads) // HEADS
            weights = {"first": self.random(D, width), "first_bias": self.random(width), "last": self.random(D, D)}
            self.define(name, "attention", {**heads, "widths": [width]}, weights)
        gelu = {"activation": "gelu", "gated": False, "widths": [HIDDEN]}
        weights = {"first": self.random(D, HIDDEN), "first_bias": self.random(HIDDEN), "last": self.random(HIDDEN, D)}
        self.define("plain mlp", "mlp", gelu, weights)
        silu = {"activation": "silu", "gated": True, "widths": [HIDDEN, HIDDEN]}
        self.define("gated mlp", "mlp", silu, {"first": self.random(D, 2 * HIDDEN), "last": self.random(HIDDEN, D)})
        self.define("linear", "linear", {"widths": [D]}, {"weight": self.random(D, D)})

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def define(self, name: str, kind: str, spec: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.session.handle({"op": "define", "segment": name, "kind": kind, "spec": spec}, tensors)

    def forward(self, name: str, new: int, **fields: Any) -> int:
        """Do a call of ``new`` tokens a row; returns its number."""
        self.calls += 1
        tensors = {"x": self.random(BATCH, new, D)}
        if name == "grouped attention":
            fields["rotary"] = {"id": self.calls}
            tensors |= {"cos": self.random(1, new, D // HEADS), "sin": self.random(1, new, D // HEADS)}
        self.session.handle({"op": "forward", "id": self.calls, "segment": name, **fields}, tensors)
        return self.calls


@pytest.mark.parametrize("whole", [False, True])
def test_the_worker_copies_no_weight_in_prefill_and_decode(worker: Worker, whole: bool) -> None:
    names = [*PARTS, "linear"]
    if whole:
        parts = ["attention", "plain mlp", "gated mlp"]
        worker.define("body", "body", {"parts": parts, "eps": [1e-5] * 3}, {"bias": worker.random(3, D)})
        names = ["body"]
    with LargeResults() as large:
        for step in range(4):
            length, new = (0, PROMPT) if step == 0 else (PROMPT + step - 1, 1)
            for name in names:
                cache = {"id": 1, "start": 0, "length": length, "rows": None}
                worker.forward(name, new, **({"cache": cache} if "attention" in name or name == "body" else {}))
    assert large.found == []


@pytest.mark.parametrize("name", [*PARTS, "linear"])
def test_the_worker_copies_no_weight_in_training(worker: Worker, name: str) -> None:
    with LargeResults() as large:
        call = worker.forward(name, PROMPT, keep=True)
        header = {"op": "backward", "id": call + 1, "segment": name, "call": call, "wants": ["x"]}
        worker.session.handle(header, {"y": worker.random(BATCH, PROMPT, D)})
    assert large.found == []


@pytest.mark.parametrize("transpose", [False, True])
def test_the_worker_copies_no_weight_for_tiles_of_rows(worker: Worker, transpose: bool) -> None:
    with LargeResults() as large:
        header = {"op": "multiply", "segment": "linear", "transpose": transpose}
        worker.session.handle(header, {"x": worker.random(2, 5, D // 2)})
    assert large.found == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4, 12])
@pytest.mark.parametrize("family", ["monarch", "haar", "permutation", "conditioned"])
def test_a_key_copies_none_of_its_factors(family: str, rows: int, dtype: torch.dtype) -> None:
    size = 512  # of which blocks of 64 are twice SMALLEST, and 12 rows are below it
    key = build(family, MasterSecret.from_insecure_test_seed(0).stream("key"), size, block=64, kappa=2.0)
    directions = (key.apply, key.apply_inverse, key.apply_transpose, key.apply_inverse_transpose)
    for run in directions:
        run(torch.randn(rows, size).to(dtype))  # factors are cast once for each dtype
    with torch.no_grad(), LargeResults() as large:
        for run in directions:
            run(torch.randn(rows, size).to(dtype))
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
