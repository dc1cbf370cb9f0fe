"""The segments a worker serves: stock torch operations on keyed weights.

A segment takes a keyed ``x`` and gives a keyed ``y``. It would compute the very same thing on plain weights: nothing
in here knows of keys. Shapes: B batch, T new tokens, S all tokens including cached ones, d width, h hidden, H heads.
Attention is in `attention.py`, a body of many parts in `body.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from obfuscatune.errors import ProtocolError
from obfuscatune.protocol.products import linear
from obfuscatune.worker.adapters import LAST, Columns, HeldFactors, SlotInputs, first_slots
from obfuscatune.worker.kv import Tokens
from obfuscatune.worker.parallel import ALONE, Group, Split

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
        uniform: whether a row that the mask allows nothing attends to all S positions alike; its output is 0 otherwise.
        rotary: cos and sin ``[1 or B, T, n]``, where q and k are rotated by position.
        past: keys and values of the S - T cached tokens of this segment, already in this call's row order; of a body,
            those of each attention in turn.
        present: set by the attention to those of all S tokens, likewise.
        recompute: whether a body keeps only what enters each part, and computes the part again in the backward.
    """

    mask: Tensor | None = None
    uniform: bool = False
    rotary: tuple[Tensor, Tensor] | None = None
    past: tuple[Tokens, ...] | None = None
    present: tuple[Tokens, ...] | None = None
    recompute: bool = False


class Segment:
    """Base of the segments: frozen keyed weights by name, and the LoRA factors that it holds, if any.

    Args:
        spec: the fields of the kind. tensors: the weights, whole. defined: the segments that are there, by name.
        group: of the processes that share the weights.
    """

    weights: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    slots: tuple[str, ...] = ()

    def __init__(
        self,
        spec: dict[str, Any],
        tensors: dict[str, Tensor],
        defined: "Mapping[str, Segment]",
        group: Group = ALONE,
    ) -> None:
        self.group = group
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


def columns_here(widths: Sequence[int], parts: Sequence[Split] | None, device: torch.device) -> list[Columns]:
    """Of layers side by side, each layer's columns that are in some ranges of all columns; None for all of them."""
    if parts is None:
        return [Columns(width) for width in widths]
    here = torch.cat([torch.arange(part.start, part.stop) for part in parts])
    found, start = [], 0
    for width in widths:
        index = here[(here >= start) & (here < start + width)] - start
        found.append(Columns(len(index), index.to(device)))
        start += width
    return found


class LinearSegment(Segment):
    """``y = x W``, on ``[..., in]``; W is that of one layer, or of several side by side."""

    weights = ("weight",)

    def __init__(
        self,
        spec: dict[str, Any],
        tensors: dict[str, Tensor],
        defined: Mapping[str, Segment],
        group: Group = ALONE,
    ) -> None:
        super().__init__(spec, tensors, defined, group)
        self.out = self.weight["weight"].shape[0]
        self.widths = widths_of(spec, self.out)
        self.slots = first_slots(len(self.widths))
        self.here = group.share(self.out)
        self.columns = columns_here(self.widths, None if group.size == 1 else [self.here], self.weight["weight"].device)
        if group.size > 1:
            self.weight["weight"] = self.weight["weight"][self.here.start : self.here.stop].clone()

    def run(self, x: Tensor, slots: SlotInputs, call: Call) -> Tensor:
        """Return ``[..., out]``."""
        slots, x = slots.of_group(self.group), self.group.enter(x)
        return self._whole(slots.add_first(self.columns, x, linear(x, self.weight["weight"])))

    def _whole(self, y: Tensor) -> Tensor:
        """All columns, of those that each process has."""
        if self.group.size == 1:
            return y
        return self.group.leave(F.pad(y, (self.here.start, self.out - self.here.stop)))

    def multiply(self, x: Tensor, *, transpose: bool) -> Tensor:
        """Return ``x_i W_i`` ``[tiles, rows, out]`` for x ``[tiles, rows, w]``.

        Tile i takes the rows of W (of its transpose) from ``min(i w, in - w)`` on.
        """
        weight = self.weight["weight"]  # [out, in]
        inputs = self.out if transpose else weight.shape[1]
        if x.ndim != 3 or not 1 <= x.shape[2] <= inputs or x.shape[0] != -(-inputs // x.shape[2]):
            raise ProtocolError("tiles of rows", got=list(x.shape), expected=f"tiles of {inputs} columns")
        if x.dtype != weight.dtype:
            raise ProtocolError("dtype of rows", got=x.dtype, expected=weight.dtype)
        width = x.shape[2]
        starts = [min(i * width, inputs - width) for i in range(len(x))]
        if not transpose:
            y = x.new_empty(*x.shape[:2], weight.shape[0])
            for i, start in enumerate(starts):
                torch.mm(x[i], weight[:, start : start + width].T, out=y[i])
            return self._whole(y)
        y = x.new_zeros(*x.shape[:2], weight.shape[1])
        for i, start in enumerate(starts):
            first, last = (
                max(start, self.here.start),
                min(start + width, self.here.stop),
            )  # of them, those that are here
            if first < last:
                rows = weight[first - self.here.start : last - self.here.start]
                torch.mm(x[i, :, first - start : last - start], rows, out=y[i])
        return self.group.leave(y)


class PartSegment(Segment):
    """Base of attention and MLP: a first product of layers side by side, something between, and a last product."""

    weights = ("first", "last")
    optional = ("first_bias",)

    def __init__(
        self,
        spec: dict[str, Any],
        tensors: dict[str, Tensor],
        defined: Mapping[str, Segment],
        group: Group = ALONE,
    ) -> None:
        super().__init__(spec, tensors, defined, group)
        self.widths = widths_of(spec, self.weight["first"].shape[0])
        self.slots = (*first_slots(len(self.widths)), LAST)
        self.prepare(spec)
        columns, rows = self.parts()
        if columns is None or rows is None:  # too few heads to share: every process has all of it
            self.group = ALONE
        device = self.weight["first"].device
        self.columns = columns_here(self.widths, columns, device)
        (self.rows,) = columns_here((self.weight["last"].shape[1],), None if rows is None else [rows], device)
        if columns is not None and rows is not None:
            first, last = self.weight["first"], self.weight["last"]
            self.weight["first"] = torch.cat([first[part.start : part.stop] for part in columns])
            self.weight["last"] = last[:, rows.start : rows.stop].clone()
            if "first_bias" in self.weight:
                bias = self.weight["first_bias"]
                self.weight["first_bias"] = torch.cat([bias[part.start : part.stop] for part in columns])

    def prepare(self, spec: dict[str, Any]) -> None:
        """Read the fields of the kind, and check the whole weights."""
        raise TypeError("a part is one of its subclasses")

    def parts(self) -> tuple[list[Split] | None, Split | None]:
        """The columns of the first product and the rows of the last one that are here; None for all of them."""
        raise TypeError("a part is one of its subclasses")

    def first(self, x: Tensor, slots: SlotInputs) -> Tensor:
        """The first product ``[..., n]``, with its bias and what slots add."""
        return slots.add_first(self.columns, x, linear(x, self.weight["first"], self.weight.get("first_bias")))

    def between(self, first: Tensor, call: Call) -> Tensor:
        """What is computed of the first product: the input of the last one."""
        raise TypeError("a part is one of its subclasses")

    def last(self, hidden: Tensor, slots: SlotInputs) -> Tensor:
        """The last product ``[..., d]``, with what its slot adds."""
        return self.group.leave(slots.add_last(self.rows, hidden, linear(hidden, self.weight["last"])))

    def run(self, x: Tensor, slots: SlotInputs, call: Call) -> Tensor:
        """Return ``[..., d]``."""
        slots = slots.of_group(self.group)
        return self.last(self.between(self.first(self.group.enter(x), slots), call), slots)


class MlpSegment(PartSegment):
    """``y = act(x W1 + b1) W2``, or gated ``y = (act(g) * u) W2`` with ``[g|u] = x W1 + b1``; on ``[..., d]``."""

    def prepare(self, spec: dict[str, Any]) -> None:
        """Read activation and gate."""
        if spec.get("activation") not in ACTIVATIONS:
            raise ProtocolError("activation", got=spec.get("activation"), expected=sorted(ACTIVATIONS))
        self.activation, self.gated = ACTIVATIONS[spec["activation"]], bool(spec.get("gated"))
        columns, hidden = self.weight["first"].shape[0], self.weight["last"].shape[1]
        if columns != hidden * (2 if self.gated else 1):
            raise ProtocolError(
                "weights of an MLP", got=f"{columns} and {hidden} neurons", expected="as many, or twice"
            )

    def parts(self) -> tuple[list[Split] | None, Split | None]:
        """This process's neurons."""
        hidden = self.weight["last"].shape[1]
        if self.group.size == 1 or hidden < self.group.size:
            return None, None
        mine = self.group.share(hidden)
        return [mine, *([Split(hidden + mine.start, hidden + mine.stop)] if self.gated else [])], mine

    def between(self, first: Tensor, call: Call) -> Tensor:
        """Return the activations ``[..., h]``."""
        if not self.gated:
            return self.activation(first)
        gate, up = first.chunk(2, dim=-1)
        return self.activation(gate) * up
