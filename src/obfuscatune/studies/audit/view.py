"""What a curious operator of the worker has after a session: what crossed, and what the worker computes of it.

Streams of a block, by name; ``gradient of NAME`` for those that cross in a backward:

    attention in -> qkv -> heads -> attention out        mlp in -> hidden -> activations -> mlp out

``qkv`` is ``q | k | v`` before rotation by position, ``hidden`` is ``up``, or ``gate | up``. Where attention or MLP are
whole on the worker, it computes ``qkv``, ``heads``, ``hidden`` and ``activations`` itself; so does the view, by the
worker's own segments in float64. A call of mixed rows is read as if its rows were tokens, tiles side by side: an
attack that assumes so finds out whether it may. How many tokens a call has, which padding and noise rows hide, attacks
are told. `audit.reader` makes a view of a recording.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from obfuscatune.enclave.mixing import tile_starts
from obfuscatune.worker.adapters import SlotInputs
from obfuscatune.worker.segments import Call as WorkerCall
from obfuscatune.worker.segments import LinearSegment, PartSegment
from obfuscatune.worker.segments import Segment as WorkerSegment

STREAMS = ("attention in", "qkv", "heads", "attention out", "mlp in", "hidden", "activations", "mlp out")
ROLES = ("qkv", "out", "up", "down")
# What goes into the product with a weight, and what comes out of it.
STREAMS_OF = {
    "qkv": ("attention in", "qkv"),
    "out": ("heads", "attention out"),
    "up": ("mlp in", "hidden"),
    "down": ("activations", "mlp out"),
}


@dataclass(frozen=True, slots=True, repr=False)
class Segment:
    """A definition: block, the roles of its weights (none of a body, which is made of others), and the worker's own.

    Attributes:
        worker: as the worker has it, in float64. added: keyed ``[out]`` bias that a body adds to what the part leaves;
            the part itself has none there.
    """

    block: int
    roles: tuple[str, ...]
    worker: WorkerSegment
    added: Tensor | None = None

    @property
    def whole(self) -> bool:
        """Whether it is a whole attention or MLP."""
        return isinstance(self.worker, PartSegment)

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of each layer that its first product computes side by side."""
        if not isinstance(self.worker, PartSegment | LinearSegment):
            return ()
        return self.worker.widths

    def weight(self, role: str) -> Tensor:
        """Keyed ``[in, out]`` weight of a role, float64."""
        name = "weight" if not self.whole else "first" if role == self.roles[0] else "last"
        return self.worker.weight[name].T

    def bias(self, role: str) -> Tensor | None:
        """Keyed ``[out]`` bias of a role, float64, where the worker adds one."""
        return self.worker.weight.get("first_bias") if role == self.roles[0] else self.added


@dataclass(frozen=True, slots=True, repr=False)
class Call:
    """One request and its reply.

    Attributes:
        inputs, outputs: tensors by wire name, to the worker and from it; with the inputs of a forward are the pushed
            LoRA factors that it uses, whichever call brought them. header: the request's fields.
        started, ended: seconds since the session's start. sent, received: bytes of request and reply.
        mask, rotary: what the calls of its pass share, as the worker has it.
    """

    segment: Segment
    header: dict[str, Any]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    started: float
    ended: float
    sent: int
    received: int
    mask: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None

    @property
    def mixed(self) -> bool:
        """Whether its rows are mixed."""
        return self.header["op"] == "multiply"  # type: ignore[no-any-return]

    @property
    def backward(self) -> bool:
        """Whether gradients cross."""
        return self.header["op"] == "backward" or bool(self.header.get("transpose"))

    def streams(self) -> dict[str, Tensor]:
        """Rows by stream ``[n, width]``, float64: what crosses, and what the worker computes of it."""
        first, last = STREAMS_OF[self.segment.roles[0]][0], STREAMS_OF[self.segment.roles[-1]][1]
        if self.mixed:
            x, y = _side_by_side(self.inputs["x"].double(), self._width()), self.outputs["y"].double().sum(dim=0)
        elif self.backward:
            x, y = _rows(self.inputs.get("y")), _rows(self.outputs.get("x"))
        else:
            x, y = _rows(self.inputs.get("x")), _rows(self.outputs.get("y"))
        if self.backward:
            found = {f"gradient of {last}": x, f"gradient of {first}": y}
        else:
            found = {first: x, last: y, **self._inner()}
        return {name: rows for name, rows in found.items() if rows is not None}

    def worker_call(self) -> tuple[dict[str, Tensor], WorkerCall]:
        """What the worker's segments compute with, in float64: tensors by wire name, and what the pass shares."""
        rotary = None if self.rotary is None else (self.rotary[0].double(), self.rotary[1].double())
        return {name: tensor.double() for name, tensor in self.inputs.items()}, WorkerCall(self.mask, rotary=rotary)

    def _width(self) -> int:
        return self.segment.weight(self.segment.roles[0]).shape[1 if self.backward else 0]

    def _inner(self) -> dict[str, Tensor]:
        """What the worker computes between the products of a whole part. LoRA that it trains itself is not added."""
        part = self.segment.worker
        if not isinstance(part, PartSegment):
            return {}
        with torch.no_grad():
            inputs, call = self.worker_call()
            first = part.first(inputs["x"], SlotInputs(inputs, {}))
            between = part.between(first, call)
        names = (STREAMS_OF[self.segment.roles[0]][1], STREAMS_OF[self.segment.roles[-1]][0])
        return dict(zip(names, (_rows(first), _rows(between)), strict=True))


@dataclass(frozen=True, slots=True, repr=False)
class WorkerView:
    """A session as the worker saw it. A *pass* is one forward, or one backward, through the model.

    Attributes:
        segments: by name. passes: calls of each pass, in order.
        held: keyed LoRA factors ``(a, b)`` that the worker was given to train, by block, first role of their segment,
            and slot; as they came.
        texts: how many each pass has, and how long they are. Where rows are mixed, nothing that crosses shows it; an
            attacker is told, so that what an attack does not find is not hidden by the padding alone.
    """

    segments: dict[str, Segment]
    passes: tuple[tuple[Call, ...], ...]
    held: dict[tuple[int, str, str], tuple[Tensor, Tensor]] = field(default_factory=dict)
    texts: tuple[tuple[int, int], ...] = ()
    _cache: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return 1 + max(segment.block for segment in self.segments.values())

    @property
    def mixed(self) -> bool:
        """Whether rows are mixed."""
        return any(call.mixed for calls in self.passes[:1] for call in calls)

    def only(self, passes: slice) -> "WorkerView":
        """The same session with some of its passes."""
        return replace(self, passes=self.passes[passes], texts=self.texts[passes], _cache={})

    def segment(self, block: int, role: str) -> Segment:
        """Where a block's weight of that role is."""
        return next(s for s in self.segments.values() if s.block == block and role in s.roles)

    def weight(self, block: int, role: str) -> Tensor:
        """Keyed ``[in, out]`` weight, float64."""
        return self.segment(block, role).weight(role)

    def calls(self, block: int, role: str, *, backward: bool = False) -> Iterator[Call]:
        """Calls of a block's segment with that role, in order."""
        for calls in self.passes:
            yield from (
                c for c in calls if c.segment.block == block and role in c.segment.roles and c.backward == backward
            )

    def rows(self, block: int, stream: str) -> Tensor:
        """All rows of a stream ``[n, width]``, float64, over all passes; none where it did not cross."""
        if (block, stream) not in self._cache:
            plain = stream.removeprefix("gradient of ")
            role = next(role for role, names in STREAMS_OF.items() if plain in names)
            calls = self.calls(block, role, backward=plain != stream)
            parts = [rows for call in calls if (rows := call.streams().get(stream)) is not None]
            self._cache[block, stream] = torch.cat(parts) if parts else torch.empty(0, 0, dtype=torch.float64)
        return self._cache[block, stream]


def _rows(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.double().flatten(0, -2)


def _side_by_side(tiles: Tensor, width: int) -> Tensor:
    """Tiles ``[tiles, m, w]`` as rows ``[m, width]``; where the last one overlaps, its own columns."""
    rows = tiles.new_zeros(tiles.shape[1], width)
    for start, tile in zip(tile_starts(width, tiles.shape[2]), tiles, strict=True):
        rows[:, start : start + tiles.shape[2]] = tile
    return rows
