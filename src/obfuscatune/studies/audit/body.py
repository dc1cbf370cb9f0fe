"""What a worker that has a whole body computes between its parts: the streams that `stream` shows in one call.

The worker evaluates part after part, forward and backward; so does whoever has its memory. One call of a body is read
as one call for each part, as if each had crossed. What a part leaves is what is added to the stream: with the body's
bias, which the worker has from the definition.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from obfuscatune.studies.audit.view import Call, Segment
from obfuscatune.worker.adapters import SlotInputs
from obfuscatune.worker.body import BodySegment
from obfuscatune.worker.segments import Call as WorkerCall
from obfuscatune.worker.segments import PartSegment


class _Watched(PartSegment):
    """A part of a body that notes what entered and left it last. Its weights are those of the part."""

    def __init__(self, part: PartSegment) -> None:
        self._part, self.weight, self.held = part, part.weight, part.held
        self.widths, self.slots = part.widths, part.slots
        self.last_call: tuple[Tensor, Tensor]

    def run(self, x: Tensor, slots: SlotInputs, call: WorkerCall) -> Tensor:
        """Return what the part gives."""
        y = self._part.run(x, slots, call)
        self.last_call = x, y
        return y


class BodyReader:
    """Reads the calls of one body, in order.

    Args:
        spec, tensors: of the body's definition, float64. defined: the segments that it is made of, by name.
    """

    def __init__(self, spec: dict[str, Any], tensors: dict[str, Tensor], defined: Mapping[str, Segment]) -> None:
        self._segments = [defined[name] for name in spec["parts"]]
        self._parts = {
            name: _Watched(segment.worker)
            for name, segment in defined.items()
            if isinstance(segment.worker, PartSegment)
        }
        self.worker = BodySegment(spec, tensors, self._parts)
        self._watched = [self._parts[name] for name in spec["parts"]]
        self._forward: Call | None = None

    def read(self, call: Call) -> list[Call]:
        """Return a call for each part, in the order in which the worker gets to them."""
        if not call.backward:
            self._forward = call
            with torch.no_grad():
                seen, _ = self._run(call)
            return [
                replace(call, segment=segment, inputs={"x": x, **_of_part(call.inputs, i)}, outputs={"y": y + bias})
                for i, (segment, bias, (x, y)) in enumerate(zip(self._segments, self.worker.bias, seen, strict=True))
            ]
        if self._forward is None:
            return []
        with torch.enable_grad():
            seen, last = self._run(self._forward)
            wanted = [tensor for pair in seen for tensor in pair]
            grads = torch.autograd.grad(last, wanted, call.inputs["y"].double())
        pairs = zip(self._segments, grads[::2], grads[1::2], strict=True)
        found = [replace(call, segment=part, inputs={"y": y}, outputs={"x": x}) for part, x, y in pairs]
        return found[::-1]

    def _run(self, call: Call) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """What entered and left each part in a forward, and what the last one leaves."""
        inputs, shared = call.worker_call()
        x = inputs["x"].requires_grad_(torch.is_grad_enabled())
        last = self.worker.run(x, SlotInputs(inputs, {}), shared)
        return [part.last_call for part in self._watched], last


def _of_part(inputs: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """The LoRA factors of one part, by the names that its own slots have: ``A.3.in0`` is ``A.in0`` of the fourth."""
    split = {name: name.split(".", 2) for name in inputs}
    return {f"{w[0]}.{w[2]}": inputs[name] for name, w in split.items() if len(w) == 3 and w[1] == str(index)}
