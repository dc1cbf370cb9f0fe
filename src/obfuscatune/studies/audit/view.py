"""What a curious operator of the worker has after a session, decoded from a recording and nothing else.

Streams of a block, by name; ``gradient of NAME`` for those that cross in a backward:

    attention in -> qkv -> heads -> attention out        mlp in -> hidden -> activations -> mlp out

Where attention or MLP are whole on the worker, it computes ``qkv``, ``heads``, ``hidden`` and ``activations`` itself,
and so does the view; where the whole body is, all of them (`audit.body`). A call of mixed rows is read as if its
rows were tokens, tiles side by side: an attack that assumes so finds out whether it may.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from obfuscatune.enclave.mixing import tile_starts
from obfuscatune.protocol.bits import unpack_mask
from obfuscatune.protocol.frames import PREFIX, decode_frame, decode_prefix
from obfuscatune.studies.audit.body import BodyReader
from obfuscatune.studies.audit.recorder import TO_WORKER, read_records
from obfuscatune.worker.segments import ACTIVATIONS

STREAMS = ("attention in", "qkv", "heads", "attention out", "mlp in", "hidden", "activations", "mlp out")
ROLES = ("qkv", "out", "up", "down")
# What goes into the product with a weight, and what comes out of it.
STREAMS_OF = {
    "qkv": ("attention in", "qkv"),
    "out": ("heads", "attention out"),
    "up": ("mlp in", "hidden"),
    "down": ("activations", "mlp out"),
}
_CALLS = ("forward", "backward", "multiply")


@dataclass(frozen=True, slots=True, repr=False)
class Segment:
    """A definition: block, the roles of its weights (none of a body, which is made of others), and its tensors."""

    block: int
    roles: tuple[str, ...]
    kind: str
    spec: dict[str, Any]
    tensors: dict[str, Tensor]

    def weight(self, role: str) -> Tensor:
        """Keyed ``[in, out]`` weight of a role, float64."""
        return self.tensors["weight" if self.kind == "linear" else role].double()


@dataclass(frozen=True, slots=True, repr=False)
class Call:
    """One request and its reply.

    Attributes:
        inputs, outputs: tensors by wire name, to the worker and from it. header: the request's fields.
        started, ended: seconds since the session's start. sent, received: bytes of request and reply.
    """

    segment: Segment
    header: dict[str, Any]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    started: float
    ended: float
    sent: int
    received: int

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
        else:
            x, y = (_rows(part.get("x" if part is self.inputs else "y")) for part in (self.inputs, self.outputs))
        if self.backward:
            if not self.mixed:
                x, y = _rows(self.inputs.get("y")), _rows(self.outputs.get("x"))
            found = {f"gradient of {last}": x, f"gradient of {first}": y}
        else:
            found = {first: x, last: y, **self._inner()}
        return {name: rows for name, rows in found.items() if rows is not None}

    def _width(self) -> int:
        return self.segment.weight(self.segment.roles[0]).shape[1 if self.backward else 0]

    def _inner(self) -> dict[str, Tensor]:
        """What the worker computes between the products of a whole submodule."""
        if self.segment.kind == "mlp":
            hidden = _rows(self.inputs["x"]) @ self.segment.weight("up") + self.segment.tensors["up_bias"].double()
            hidden = hidden + self._low_rank("up")
            return {"hidden": hidden, "activations": ACTIVATIONS[self.segment.spec["activation"]](hidden)}
        if self.segment.kind == "attention":
            qkv = _rows(self.inputs["x"]) @ self.segment.weight("qkv") + self.segment.tensors["qkv_bias"].double()
            qkv = qkv + self._low_rank("qkv")
            return {"qkv": qkv, "heads": self._attend(qkv)}
        return {}

    def _low_rank(self, slot: str, rows: Tensor | None = None) -> Tensor | float:
        """What LoRA adds there, of ``u``, or of the rows that go in."""
        u, a, b, c = (self.inputs.get(f"{kind}.{slot}") for kind in "uABc")
        if b is None or (u is None and a is None):
            return 0.0
        if u is not None or a is None:
            return _rows(u) @ b.double()  # type: ignore[no-any-return]
        rows = _rows(self.inputs["x"]) if rows is None else rows
        return (rows @ a.double() + (0.0 if c is None else c.double())) @ b.double()

    def product(self) -> Tensor:
        """What a whole submodule computes ``[n, width]``, float64."""
        role = self.segment.roles[-1]
        rows = self._inner()[STREAMS_OF[role][0]]
        return rows @ self.segment.weight(role) + self._low_rank(role, rows)

    def attention_logits(self) -> Tensor:
        """Scaled ``q k^T`` ``[B, H, T, T]`` of a whole attention, float64, not masked."""
        q, k, _ = self._heads(self._inner()["qkv"])
        return q @ k.mT * float(self.segment.spec["scale"])

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, _ = self.inputs["x"].shape
        q, k, v = qkv.view(batch, tokens, 3, int(self.segment.spec["heads"]), -1).permute(2, 0, 3, 1, 4)
        return q, k, v

    def _attend(self, qkv: Tensor) -> Tensor:
        q, k, v = self._heads(qkv)
        logits = q @ k.mT * float(self.segment.spec["scale"])
        if "mask" in self.inputs:
            allowed = unpack_mask(self.inputs["mask"], self.header["mask_shape"])
        else:
            allowed = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
        return (logits.masked_fill(~allowed, -math.inf).softmax(-1) @ v).transpose(1, 2).flatten(2).flatten(0, 1)


@dataclass(frozen=True, slots=True, repr=False)
class WorkerView:
    """A session as the worker saw it. A *pass* is one forward, or one backward, through the model.

    Attributes:
        segments: by name. passes: calls of each pass, in order.
        held: keyed LoRA factors ``(a, b)`` that the worker was given to train, by block and role, as they came.
    """

    segments: dict[str, Segment]
    passes: tuple[tuple[Call, ...], ...]
    held: dict[tuple[int, str], tuple[Tensor, Tensor]] = field(default_factory=dict)
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
        return replace(self, passes=self.passes[passes], _cache={})

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


def read_view(path: Path) -> WorkerView:
    """Decode a recording."""
    segments: dict[str, Segment] = {}
    passes: list[list[Call]] = []
    held: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    pending: dict[int, Any] = {}
    bodies: dict[str, BodyReader] = {}
    last: tuple[int, bool] | None = None
    for direction, seconds, size, header, tensors in _frames(path):
        if direction == TO_WORKER:
            if header["op"] == "define":
                segments[header["segment"]] = _segment(header, tensors, segments)
            elif header["op"] == "hold":
                segment = segments[header["segment"]]
                role = segment.roles[0] if header["slot"] == "main" else header["slot"]
                held.setdefault((segment.block, role), (tensors["a"], tensors["b"]))
            elif header["op"] in _CALLS:
                pending[header["id"]] = (header, tensors, seconds, size)
            continue
        if header.get("id") not in pending:
            continue
        request, inputs, started, sent = pending.pop(header["id"])
        segment = segments[request["segment"]]
        whole = Call(segment, request, inputs, tensors, started, seconds, sent, size)
        if segment.kind == "body":
            reader = bodies.setdefault(request["segment"], BodyReader(segment, segments))
        for call in reader.read(whole) if segment.kind == "body" else [whole]:
            place = (call.segment.block * len(ROLES) + ROLES.index(call.segment.roles[0]), call.backward)
            if last is None or place[1] != last[1] or (place[0] < last[0]) != place[1] or place[0] == last[0]:
                passes.append([])
            passes[-1].append(call)
            last = place
    return WorkerView(segments, tuple(tuple(calls) for calls in passes), held)


def _segment(header: dict[str, Any], tensors: dict[str, Tensor], before: dict[str, Segment]) -> Segment:
    """Block and roles of a definition follow from the order: q,k,v; output; up; down, block after block."""
    if header["kind"] == "body":
        return Segment(0, (), "body", header["spec"], tensors)
    covered = sum(len(segment.roles) for segment in before.values())
    block, first = divmod(covered, len(ROLES))
    roles = ROLES[first : first + (1 if header["kind"] == "linear" else 2)]
    return Segment(block, roles, header["kind"], header["spec"], tensors)


def _frames(path: Path) -> Iterator[tuple[int, float, int, dict[str, Any], dict[str, Tensor]]]:
    """Direction, seconds of the first byte, size, fields and tensors of each frame."""
    buffers: dict[int, bytearray] = {}
    begun: dict[int, float] = {}
    for direction, seconds, run in read_records(path):
        buffer = buffers.setdefault(direction, bytearray())
        if not buffer:
            begun[direction] = seconds
        buffer += run
        if len(buffer) >= PREFIX.size:
            end = PREFIX.size + sum(decode_prefix(bytes(buffer[: PREFIX.size])))
            if len(buffer) >= end:
                fields, tensors = decode_frame(memoryview(bytes(buffer[:end])))
                yield direction, begun[direction], end, fields, {n: _tensor(*entry) for n, entry in tensors.items()}
                del buffer[:end]


def _tensor(spec: Any, elements: memoryview) -> Tensor:
    if not elements:
        return torch.empty(spec.shape, dtype=spec.dtype)
    return torch.frombuffer(bytearray(elements), dtype=spec.dtype).view(spec.shape)


def _rows(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.double().flatten(0, -2)


def _side_by_side(tiles: Tensor, width: int) -> Tensor:
    """Tiles ``[tiles, m, w]`` as rows ``[m, width]``; where the last one overlaps, its own columns."""
    rows = tiles.new_zeros(tiles.shape[1], width)
    for start, tile in zip(tile_starts(width, tiles.shape[2]), tiles, strict=True):
        rows[:, start : start + tiles.shape[2]] = tile
    return rows
