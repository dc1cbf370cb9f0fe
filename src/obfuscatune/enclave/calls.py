"""One remote call as an autograd node: the forward request now, the backward request when the gradient comes.

The worker keeps a call's graph from its forward to its backward. Where the node dies without a backward (an
evaluation under autograd, an exception), its lease tells the worker to forget the call.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from obfuscatune.enclave.freivalds import Check
from obfuscatune.enclave.held import HeldSlot
from obfuscatune.enclave.session import Session


@dataclass(slots=True, repr=False)  # a repr would show activations
class RemoteCall:
    """What one forward call sends.

    Attributes:
        session, segment, layer: whom to ask, what for, and the layer's path for messages.
        tensors: keyed tensors by wire name; those that require grad get one.
        push: names in ``tensors`` of LoRA factors that the worker does not have yet in this value, and whom to tell
            once it has.
        factors: names of all pushed factors that this call uses.
        held: slots whose factors the worker holds, by slot name.
        header: further fields of the request (mask shape, cache, causal).
        mask: packed mask, if any.
        shapes: shape of each tensor of the reply.
        check: verifies ``y = x W``, and the backward's ``dx = dy W^T``, of a linear segment without a LoRA slot.
    """

    session: Session
    segment: str
    layer: str
    tensors: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    push: dict[str, Callable[[], None]] = field(default_factory=dict)
    factors: list[str] = field(default_factory=list)
    held: dict[str, HeldSlot] = field(default_factory=dict)
    header: dict[str, Any] = field(default_factory=dict)
    mask: Tensor | None = None
    check: Check | None = None
    id: int = 0

    def run(self) -> dict[str, Tensor]:
        """Do the call and return the reply's tensors by name, differentiable where an input is."""
        anchors = {f"anchor.{slot}": held.anchor for slot, held in self.held.items()}
        inputs = {**self.tensors, **anchors}
        if torch.is_grad_enabled() and any(t.requires_grad for t in inputs.values()):
            outputs = _Remote.apply(  # type: ignore[no-untyped-call]
                self, list(inputs), *inputs.values()
            )
            return dict(zip(self.shapes, outputs, strict=True))
        return self._forward(keep=False)

    def _forward(self, *, keep: bool) -> dict[str, Tensor]:
        dtype = self.tensors["x"].dtype
        sent = {n: t.detach() for n, t in self.tensors.items() if n not in self.factors or n in self.push}
        if self.mask is not None:
            sent["mask"] = self.mask
        header = {
            "segment": self.segment,
            "keep": keep,
            "factors": self.factors,
            "held": list(self.held),
            **self.header,
        }
        expected = {name: (shape, dtype) for name, shape in self.shapes.items()}
        reply, outputs = self.session.request("forward", self.layer, header, sent, expected)
        if self.check is not None:
            self.check.require(self.session, self.layer, sent["x"], outputs["y"])
        self.id = reply["id"]
        for arrived in self.push.values():
            arrived()
        return outputs

    def _backward(self, wants: list[str], grads: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        fresh = [slot for slot, held in self.held.items() if held.begin_backward()]
        header = {"segment": self.segment, "call": self.id, "wants": wants, "fresh": fresh}
        expected = {name: (tuple(self.tensors[name].shape), self.tensors[name].dtype) for name in wants}
        reply, found = self.session.request("backward", self.layer, header, grads, expected)
        if self.check is not None:
            self.check.require(self.session, self.layer, grads["y"], found["x"], transpose=True)
        norms = reply.get("gradient_norms")
        if not isinstance(norms, dict):
            raise self.session.fault("gradient norms", self.layer, got=type(norms).__name__, expected="map")
        anchors = {f"anchor.{slot}": held.take_norm(norms.get(slot)) for slot, held in self.held.items()}
        return found, anchors


class _Lease:
    """Tells the worker to forget a call, unless its backward was asked for."""

    def __init__(self, call: RemoteCall) -> None:
        self._call: RemoteCall | None = call

    def consume(self) -> RemoteCall:
        call, self._call = self._call, None
        if call is None:
            raise RuntimeError(
                "backward through a remote layer a second time: the worker frees a call's graph at its first backward, "
                "so retain_graph=True is not supported there"
            )
        return call

    def __del__(self) -> None:
        if self._call is not None:
            self._call.session.drop_call(self._call.id)


class _Remote(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: RemoteCall, names: list[str], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        outputs = call._forward(keep=True)
        ctx.lease, ctx.names = _Lease(call), names
        return tuple(outputs[name] for name in call.shapes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        call: RemoteCall = ctx.lease.consume()
        needed = dict(zip(ctx.names, ctx.needs_input_grad[2:], strict=True))
        wants = [name for name in call.tensors if needed[name]]
        given = {name: grad.contiguous() for name, grad in zip(call.shapes, grads, strict=True) if grad is not None}
        found, anchors = call._backward(wants, given)
        return None, None, *(found.get(name, anchors.get(name)) for name in ctx.names)
