"""What a worker that has a whole body computes between its parts: the streams that `stream` shows in one call.

The worker evaluates ``x <- x + part(rms_norm(x)) + b`` part after part, forward and backward; so does whoever has its
memory. One call of a body is read as one call for each part, as if each had crossed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

if TYPE_CHECKING:
    from obfuscatune.studies.audit.view import Call, Segment

_FACTORS = ("A.", "B.", "c.")


class BodyReader:
    """Reads the calls of one body, in order: factors that were pushed once serve later calls too."""

    def __init__(self, body: "Segment", defined: "Mapping[str, Segment]") -> None:
        self._parts: Sequence[Segment] = [defined[name] for name in body.spec["parts"]]
        self._eps, self._bias = body.spec["eps"], body.tensors["bias"].double()
        self._factors: dict[str, Tensor] = {}
        self._forward: Any = None

    def read(self, call: "Call") -> "list[Call]":
        """Return a call for each part, in the order in which the worker gets to them."""
        self._factors |= {name: tensor for name, tensor in call.inputs.items() if name.startswith(_FACTORS)}
        if not call.backward:
            self._forward = call
            with torch.no_grad():
                return self._parts_of(call)[0]
        with torch.enable_grad():
            calls, last = self._parts_of(self._forward)
            wanted = [tensor for part in calls for tensor in (part.inputs["x"], part.outputs["y"])]
            grads = torch.autograd.grad(last, wanted, call.inputs["y"].double())
        pairs = zip(self._parts, grads[::2], grads[1::2], strict=True)
        found = [replace(call, segment=part, inputs={"y": y}, outputs={"x": x}) for part, x, y in pairs]
        return found[::-1]

    def _parts_of(self, call: "Call") -> "tuple[list[Call], Tensor]":
        """Calls of all parts in a forward, and what the last one leaves."""
        x = call.inputs["x"].double().requires_grad_(torch.is_grad_enabled())
        shared = {name: tensor for name, tensor in call.inputs.items() if name == "mask"}
        found = []
        for i, part in enumerate(self._parts):
            rows = F.rms_norm(x, x.shape[-1:], eps=self._eps[i])
            factors = {n.replace(f".{i}.", "."): t for n, t in self._factors.items() if n[2:].startswith(f"{i}.")}
            step = replace(call, segment=part, inputs={"x": rows, **shared, **factors}, outputs={})
            y = step.product().view_as(x)
            found.append(replace(step, outputs={"y": y}))
            x = x + y + self._bias[i]
        return found, x
