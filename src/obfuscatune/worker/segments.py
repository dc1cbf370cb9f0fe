"""The segments a worker serves: stock torch operations on keyed weights.

A segment takes a keyed ``x`` and gives a keyed ``y``. It would compute the very same thing on plain weights: nothing
in here knows of keys. Shapes: B batch, T new tokens, S all tokens including cached ones, d width, h hidden, H heads.
Attention is in `attention.py`, a body of many parts in `body.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from obfuscatune.errors import ProtocolError
from obfuscatune.protocol.products import linear
from obfuscatune.worker.adapters import LAST, HeldFactors, SlotInputs, first_slots

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
        mask: bool ``[B, 1, T, S]``, True where attention is allowed; without one position t sees positions up to t.
        rotary: cos and sin ``[1 or B, T, n]``, where q and k are rotated by position.
        past: cached keys and values ``[B, H, S - T, head_dim]`` of this segment, already in this call's row order; of a
            body, those of each attention in turn.
        present: set by the attention to keys and values of all S tokens.
        recompute: whether a body keeps only what enters each part, and computes the part again in the backward.
    """

    mask: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    past: tuple[Tensor, ...] | None = None
    present: tuple[Tensor, ...] | None = None
    recompute: bool = False


class Segment:
    """Base of the segments: frozen keyed weights by name, and the LoRA factors that it holds, if any.

    Args:
        spec: the fields of the kind. tensors: the weights. defined: the segments that are there, by name.
    """

    weights: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    slots: tuple[str, ...] = ()

    def __init__(self, spec: dict[str, Any], tensors: dict[str, Tensor], defined: "Mapping[str, Segment]") -> None:
        missing = set(self.weights) - set(tensors)
        unknown = set(tensors) - set(self.weights) - set(self.optional)
        if missing or unknown:
            raise ProtocolError("weights of a segment", got=sorted(tensors), expected=sorted(self.weights))
        for name in self.weights:
            if tensors[name].ndim != 2:
                raise ProtocolError("weight of a segment", got=f"{tensors[name].ndim} dimensions", expected="2")
        # Matrices come as [in, out] and are kept as [out, in], the layout of `F.linear`.
        self.weight = {name: tensor.T.contiguous() if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}
        self.held: dict[str, HeldFactors] = {}

    def run(self, x: Tensor, slots: SlotInputs, call: Call) -> Tensor:
        """Return ``y``; see the subclasses."""
        raise TypeError("a segment is one of its subclasses")


def widths_of(spec: dict[str, Any], columns: int) -> tuple[int, ...]:
    """Columns of each of the layers that a segment's first product computes side by side; one where none are told."""
    widths = spec.get("widths", [columns])
    whole = isinstance(widths, list) and widths and all(type(w) is int and w > 0 for w in widths)
    if not isinstance(widths, list) or not whole or sum(widths) != columns:
        raise ProtocolError("widths of layers side by side", expected=f"positive numbers that add up to {columns}")
    return tuple(widths)


class LinearSegment(Segment):
    """``y = x W``, on ``[..., in]``; W is that of one layer, or of several side by side."""

    weights = ("weight",)

    def __init__(self, spec: dict[str, Any], tensors: dict[str, Tensor], defined: Mapping[str, Segment]) -> None:
        super().__init__(spec, tensors, defined)
        self.widths = widths_of(spec, self.weight["weight"].shape[0])
        self.slots = first_slots(len(self.widths))

    def run(self, x: Tensor, slots: SlotInputs, call: Call) -> Tensor:
        """Return ``[..., out]``."""
        return slots.add_first(self.widths, x, linear(x, self.weight["weight"]))

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


class PartSegment(Segment):
    """Base of attention and MLP: a first product of layers side by side, something between, and a last product."""

    weights = ("first", "last")
    optional = ("first_bias",)

    def __init__(self, spec: dict[str, Any], tensors: dict[str, Tensor], defined: Mapping[str, Segment]) -> None:
        super().__init__(spec, tensors, defined)
        self.widths = widths_of(spec, self.weight["first"].shape[0])
        self.slots = (*first_slots(len(self.widths)), LAST)

    def first(self, x: Tensor, slots: SlotInputs) -> Tensor:
        """The first product ``[..., n]``, with its bias and what slots add."""
        return slots.add_first(self.widths, x, linear(x, self.weight["first"], self.weight.get("first_bias")))

    def between(self, first: Tensor, call: Call) -> Tensor:
        """What is computed of the first product: the input of the last one."""
        raise TypeError("a part is one of its subclasses")

    def last(self, hidden: Tensor, slots: SlotInputs) -> Tensor:
        """The last product ``[..., d]``, with what its slot adds."""
        return slots.add(LAST, hidden, linear(hidden, self.weight["last"]))

    def run(self, x: Tensor, slots: SlotInputs, call: Call) -> Tensor:
        """Return ``[..., d]``."""
        return self.last(self.between(self.first(x, slots), call), slots)


class MlpSegment(PartSegment):
    """``y = act(x W1 + b1) W2``, or gated ``y = (act(g) * u) W2`` with ``[g|u] = x W1 + b1``; on ``[..., d]``."""

    def __init__(self, spec: dict[str, Any], tensors: dict[str, Tensor], defined: Mapping[str, Segment]) -> None:
        super().__init__(spec, tensors, defined)
        if spec.get("activation") not in ACTIVATIONS:
            raise ProtocolError("activation", got=spec.get("activation"), expected=sorted(ACTIVATIONS))
        self.activation, self.gated = ACTIVATIONS[spec["activation"]], bool(spec.get("gated"))
        columns, hidden = self.weight["first"].shape[0], self.weight["last"].shape[1]
        if columns != hidden * (2 if self.gated else 1):
            raise ProtocolError(
                "weights of an MLP", got=f"{columns} and {hidden} neurons", expected="as many, or twice"
            )

    def between(self, first: Tensor, call: Call) -> Tensor:
        """Return the activations ``[..., h]``."""
        if not self.gated:
            return self.activation(first)
        gate, up = first.chunk(2, dim=-1)
        return self.activation(gate) * up
