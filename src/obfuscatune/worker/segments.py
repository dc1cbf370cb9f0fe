"""The segments a worker serves: stock torch operations on keyed weights.

A segment takes a keyed ``x`` and gives a keyed ``y``. It would compute the very same thing on plain weights: nothing
in here knows of keys. Shapes: B batch, T new tokens, S all tokens including cached ones, d width, h hidden, H heads.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from obfuscatune.errors import ProtocolError
from obfuscatune.protocol.products import linear
from obfuscatune.worker.adapters import HeldFactors, SlotInputs

# One kernel each. `gelu_new` is transformers' name for the tanh form, which it computes in seven.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_fast": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


@dataclass(slots=True, repr=False)  # a repr would show activations
class Call:
    """What a forward call brings besides ``x`` and the LoRA slots.

    Attributes:
        mask: bool ``[B, 1, T, S]``, True where attention is allowed; None with ``causal`` telling the rest.
        causal: whether position t sees positions up to t only; used without a mask.
        past: cached keys and values ``[B, H, S - T, head_dim]`` of this segment, already in this call's row order; of a
            body, those of each attention in turn.
        present: set by the attention to keys and values of all S tokens.
        recompute: whether a body keeps only what enters each part, and computes the part again in the backward.
    """

    mask: Tensor | None = None
    causal: bool = True
    past: tuple[Tensor, ...] | None = None
    present: tuple[Tensor, ...] | None = None
    recompute: bool = False


class Segment:
    """Base of the segments: frozen keyed weights by name, and the LoRA factors that it holds, if any.

    Args:
        spec: the fields of the kind. tensors: the weights. defined: the segments that are there, by name.
    """

    slots: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()

    def __init__(self, spec: dict[str, Any], tensors: dict[str, Tensor], defined: "Mapping[str, Segment]") -> None:
        missing = set(self.weights) - set(tensors)
        unknown = set(tensors) - set(self.weights)
        if missing or unknown:
            raise ProtocolError("weights of a segment", got=sorted(tensors), expected=sorted(self.weights))
        # Matrices come as [in, out] and are kept as [out, in], the layout of `F.linear`.
        self.weight = {name: tensor.T.contiguous() if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}
        self.held: dict[str, HeldFactors] = {}

    def run(self, x: Tensor, slots: SlotInputs, call: Call) -> Tensor:
        """Return ``y``; see the subclasses."""
        raise TypeError("a segment is one of its subclasses")


class LinearSegment(Segment):
    """``y = x W``, on ``[..., in]``."""

    slots = ("main",)
    weights = ("weight",)

    def run(self, x: Tensor, slots: SlotInputs, call: Call) -> Tensor:
        """Return ``[..., out]``."""
        return slots.add("main", x, linear(x, self.weight["weight"]))

    def multiply(self, x: Tensor, *, transpose: bool) -> Tensor:
        """Return ``x_i W_i`` ``[tiles, rows, out]`` for x ``[tiles, rows, w]``.

        Tile i takes the rows of W (of its transpose) from ``min(i w, in - w)`` on.
        """
        weight = self.weight["weight"] if not transpose else self.weight["weight"].T  # [out, in]
        if x.ndim != 3 or not 1 <= x.shape[2] <= weight.shape[1] or x.shape[0] != -(-weight.shape[1] // x.shape[2]):
            raise ProtocolError("tiles of rows", got=list(x.shape), expected=f"tiles of {weight.shape[1]} columns")
        if x.dtype != weight.dtype:
            raise ProtocolError("dtype of rows", got=x.dtype, expected=weight.dtype)
        y = x.new_empty(*x.shape[:2], weight.shape[0])
        for i, part in enumerate(x):
            start = min(i * x.shape[2], weight.shape[1] - x.shape[2])
            torch.mm(part, weight[:, start : start + x.shape[2]].T, out=y[i])
        return y


class MlpSegment(Segment):
    """``y = act(x W1 + b1) W2``, on ``[..., d]``."""

    slots = ("up", "down")
    weights = ("up", "up_bias", "down")

    def __init__(self, spec: dict[str, Any], tensors: dict[str, Tensor], defined: Mapping[str, Segment]) -> None:
        super().__init__(spec, tensors, defined)
        if spec.get("activation") not in ACTIVATIONS:
            raise ProtocolError("activation", got=spec.get("activation"), expected=sorted(ACTIVATIONS))
        self.activation = ACTIVATIONS[spec["activation"]]

    def run(self, x: Tensor, slots: SlotInputs, call: Call) -> Tensor:
        """Return ``[..., d]``."""
        hidden = linear(x, self.weight["up"], self.weight["up_bias"])
        hidden = self.activation(slots.add("up", x, hidden))
        return slots.add("down", hidden, linear(hidden, self.weight["down"]))


class AttentionSegment(Segment):
    """``y = softmax(q k^T scale) v Wo`` with ``[q|k|v] = x Wqkv + b``, on ``[B, T, d]``."""

    slots = ("qkv", "out")
    weights = ("qkv", "qkv_bias", "out")

    def __init__(self, spec: dict[str, Any], tensors: dict[str, Tensor], defined: Mapping[str, Segment]) -> None:
        super().__init__(spec, tensors, defined)
        self.heads, self.scale = int(spec["heads"]), float(spec["scale"])
        width = self.weight["qkv"].shape[0]
        if self.heads < 1 or width % (3 * self.heads):
            raise ProtocolError("heads of an attention segment", got=self.heads, expected=f"a divisor of {width // 3}")

    def run(self, x: Tensor, slots: SlotInputs, call: Call) -> Tensor:
        """Return ``[B, T, d]`` and set ``call.present``."""
        batch, new, _ = x.shape
        qkv = linear(x, self.weight["qkv"], self.weight["qkv_bias"])
        qkv = slots.add("qkv", x, qkv)
        q, k, v = qkv.view(batch, new, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if call.past is not None:
            k, v = torch.cat([call.past[0], k], dim=2), torch.cat([call.past[1], v], dim=2)
        call.present = (k, v)
        causal = call.causal and call.mask is None and new > 1
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=call.mask, is_causal=causal, scale=self.scale)
        h = h.transpose(1, 2).flatten(2)
        return slots.add("out", h, linear(h, self.weight["out"]))


class BodySegment(Segment):
    """``x <- x + part(x / sqrt(mean(x^2) + eps)) + b`` for part after part, on ``[B, T, d]``: a whole decoder body.

    The parts are attention and mlp segments that are defined already. A slot of part i is called ``i.<slot>``.
    """

    weights = ("bias",)

    def __init__(self, spec: dict[str, Any], tensors: dict[str, Tensor], defined: Mapping[str, Segment]) -> None:
        super().__init__(spec, tensors, defined)
        names, eps, self.bias = spec.get("parts"), spec.get("eps"), tensors["bias"]
        known = {name for name, segment in defined.items() if isinstance(segment, AttentionSegment | MlpSegment)}
        if not isinstance(names, list) or not names or not all(isinstance(n, str) and n in known for n in names):
            raise ProtocolError("parts of a body", expected="names of attention and mlp segments")
        if not isinstance(eps, list) or len(eps) != len(names) or not all(map(_is_eps, eps)):
            raise ProtocolError("eps of a body", expected="a positive float for each part")
        self.parts, self.eps = [defined[name] for name in names], eps
        widths = [width for part in self.parts for width in _widths(part)]
        if list(self.bias.shape) != [len(names), widths[0]] or len(set(widths)) != 1:
            got = f"bias {list(self.bias.shape)}, parts of {sorted(set(widths))}"
            raise ProtocolError("widths of a body", got=got, expected="one width, and a row of bias for each part")

    def run(self, x: Tensor, slots: SlotInputs, call: Call) -> Tensor:
        """Return ``[B, T, d]`` and set ``call.present``."""
        present: list[Tensor] = []
        for index, part in enumerate(self.parts):
            inner = Call(mask=call.mask, causal=call.causal)
            if call.past is not None and isinstance(part, AttentionSegment):
                inner.past = call.past[len(present) : len(present) + 2]
            step = partial(self._step, index, slots.of_part(index), inner)
            # Nothing in a step is random, so there is no state to restore.
            x = checkpoint(step, x, use_reentrant=False, preserve_rng_state=False) if call.recompute else step(x)
            present += inner.present or ()
        call.present = tuple(present)
        return x

    def _step(self, index: int, slots: SlotInputs, call: Call, x: Tensor) -> Tensor:
        rows: Tensor = _RmsNorm.apply(x, self.eps[index])  # type: ignore[no-untyped-call]
        return x + self.parts[index].run(rows, slots, call) + self.bias[index]


class _RmsNorm(torch.autograd.Function):
    """``y = s x`` with ``s = 1 / sqrt(mean(x^2) + eps)``; ``dx = s (dy - y mean(dy y))``. Half dtypes in float32.

    On a CPU torch differentiates its own step by step: 512 rows of 768 take .5 to 3 ms there and back, .3 here and in a
    LayerNorm.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        scale = (torch.linalg.vecdot(wide, wide).unsqueeze(-1) / x.shape[-1] + eps).rsqrt()
        y: Tensor = (wide * scale).to(x.dtype)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        y, scale = ctx.saved_tensors
        wide, rows = _wide(grad), _wide(y)
        along = torch.linalg.vecdot(wide, rows).unsqueeze(-1) / y.shape[-1]
        return (torch.addcmul(wide, rows, along, value=-1) * scale).to(grad.dtype), None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _is_eps(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value > 0


def _widths(part: Segment) -> tuple[int, int]:
    """Widths of what enters and of what leaves an attention or an mlp, by its first and its last weight."""
    first, last = part.weight[part.weights[0]], part.weight[part.weights[-1]]
    if first.ndim != 2 or last.ndim != 2:
        raise ProtocolError("weights of a part of a body", got=f"{first.ndim} and {last.ndim} dimensions", expected="2")
    return first.shape[1], last.shape[0]


SEGMENTS: dict[str, type[Segment]] = {
    "linear": LinearSegment,
    "mlp": MlpSegment,
    "attention": AttentionSegment,
    "body": BodySegment,
}
