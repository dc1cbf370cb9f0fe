"""Makes of a recording the view that the worker's operator has of the session."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from obfuscatune.protocol.bits import unpack_mask
from obfuscatune.studies.audit.body import BodyReader
from obfuscatune.studies.audit.view import ROLES, Call, Segment, WorkerView
from obfuscatune.studies.audit.wire import Frame, read_frames
from obfuscatune.worker.session import SEGMENTS

_CALLS = ("forward", "backward", "multiply")
_PUSHED = ("A.", "B.", "c.")


@dataclass(slots=True, repr=False)
class _Session:
    """What the worker has of a session so far: segments, pushed factors, and what calls of a pass share.

    Attributes:
        start: number of the first block that the worker has.
    """

    start: int = 0
    segments: dict[str, Segment] = field(default_factory=dict)
    bodies: dict[str, BodyReader] = field(default_factory=dict)
    held: dict[tuple[int, str, str], tuple[Tensor, Tensor]] = field(default_factory=dict)
    _pushed: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    _shared: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)

    def define(self, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Block and roles of a definition follow from the order: q,k,v; output; up; down, block after block."""
        name, kind, spec = header["segment"], header["kind"], header["spec"]
        wide = {name: tensor.double() for name, tensor in tensors.items()}
        if kind == "body":
            parts = zip(spec["parts"], wide["bias"], strict=True)
            self.segments |= {part: replace(self.segments[part], added=bias) for part, bias in parts}
            self.bodies[name] = reader = BodyReader(spec, wide, self.segments)
            self.segments[name] = Segment(self.start, (), reader.worker)
            return
        block, first = divmod(sum(len(segment.roles) for segment in self.segments.values()), len(ROLES))
        roles = ROLES[first : first + (1 if kind == "linear" else 2)]
        self.segments[name] = Segment(self.start + block, roles, SEGMENTS[kind](spec, wide, {}))

    def hold(self, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Note factors that the worker is given to train, as they came first."""
        segment = self.segments[header["segment"]]
        place = (segment.block, segment.roles[0], header["slot"])
        self.held.setdefault(place, (tensors["a"], tensors["b"]))

    def call(self, request: Frame, reply: Frame) -> list[Call]:
        """The call of a request and its reply; of a body, one for each part."""
        header, inputs = request.header, dict(request.tensors)
        name = header["segment"]
        mask, rotary = self._share(header, inputs)
        pushed = self._pushed.setdefault(name, {})
        pushed |= {key: inputs[key] for key in inputs if key.startswith(_PUSHED) and header["op"] == "forward"}
        inputs |= {key: pushed[key] for key in header.get("factors", ())}
        call = Call(
            segment=self.segments[name],
            header=header,
            inputs=inputs,
            outputs=reply.tensors,
            started=request.seconds,
            ended=reply.seconds,
            sent=request.size,
            received=reply.size,
            mask=mask,
            rotary=rotary,
        )
        return self.bodies[name].read(call) if name in self.bodies else [call]

    def _share(
        self, header: dict[str, Any], inputs: dict[str, Tensor]
    ) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
        """Mask and rotary tables of a call, which the first call of a pass brings; they leave the inputs."""
        mask = rotary = None
        if (entry := header.get("mask")) is not None:
            if "mask" in inputs:
                self._shared[entry["id"]] = (unpack_mask(inputs.pop("mask"), entry["shape"]),)
            mask = self._shared[entry["id"]][0]
        if (entry := header.get("rotary")) is not None:
            if "cos" in inputs:
                self._shared[entry["id"]] = inputs.pop("cos"), inputs.pop("sin")
            cos, sin = self._shared[entry["id"]]
            rotary = cos, sin
        return mask, rotary


def read_view(path: Path, start: int = 0) -> WorkerView:
    """Decode a recording. start: number of the first block that the worker has."""
    session = _Session(start)
    passes: list[list[Call]] = []
    pending: dict[int, Frame] = {}
    last: tuple[int, bool] | None = None
    for frame in read_frames(path):
        if frame.request:
            if frame.header["op"] == "define":
                session.define(frame.header, frame.tensors)
            elif frame.header["op"] == "hold":
                session.hold(frame.header, frame.tensors)
            elif frame.header["op"] in _CALLS:
                pending[frame.header["id"]] = frame
            continue
        request = pending.pop(frame.header.get("id", -1), None)
        for call in [] if request is None else session.call(request, frame):
            place = (call.segment.block * len(ROLES) + ROLES.index(call.segment.roles[0]), call.backward)
            if last is None or place[1] != last[1] or (place[0] < last[0]) != place[1] or place[0] == last[0]:
                passes.append([])
            passes[-1].append(call)
            last = place
    return WorkerView(session.segments, tuple(tuple(calls) for calls in passes), session.held)
