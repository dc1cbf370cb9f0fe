"""One remote call as an autograd node: the forward request now, the backward request when the gradient comes.

The worker keeps a call's graph from its forward to its backward. Where the node dies without a backward (an
evaluation under autograd, an exception), its lease tells the worker to forget the call.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from obfuscatune.enclave.freivalds import Check
from obfuscatune.enclave.remote.accumulated import is_wanted
from obfuscatune.enclave.session import Session
from obfuscatune.errors import NotFiniteError, UnsupportedModelError, UsageError
from obfuscatune.protocol.derivatives import first_only, origin

_NOTHING = nullcontext()


def without_autocast() -> AbstractContextManager[Any]:
    """A context in which torch computes in the dtypes that tensors have: keys, shares of a sum and checks need them.

    Under ``torch.autocast`` a remote layer so computes in the dtype of its weights, which is more exact than the plain
    one, and not in half of it.
    """
    if not torch.is_autocast_enabled("cpu"):  # nearly always; the context costs as much as a small product
        return _NOTHING
    return torch.autocast("cpu", enabled=False)


def version_of(tensor: Tensor) -> int:
    """Return the count of a tensor's changes in place, which tensors made under ``inference_mode`` do not have."""
    return -1 if tensor.is_inference() else tensor._version


class Held(Protocol):
    """A LoRA slot whose factors the worker holds, as a call sees it; `held.py` has the thing itself."""

    anchor: nn.Parameter

    def begin_backward(self) -> float | None:
        """Return what the worker multiplies the slot's gradient with first; None to clear it."""

    def take_norm(self, norm: Any, factors: tuple[str, ...]) -> Tensor:
        """Return the gradient of the anchor, from the norm that the worker told."""

    def lose_gradient(self) -> None:
        """Note that the worker may have added to the gradient what nobody here has seen."""


@dataclass(slots=True, repr=False)  # a repr would show activations
class RemoteCall:
    """What one forward call sends.

    Attributes:
        session, segment, layer: whom to ask, what for, and the layer's path for messages.
        tensors: keyed tensors by wire name; those that require grad get one.
        shapes: shape of each tensor of the reply.
        header: further fields of the request (mask, rotary, cache). extras: further tensors, which have no gradient.
        factors: names of all pushed LoRA factors that this call uses; push: those of them in ``tensors`` that the
            worker does not have yet in this value.
        held: slots whose factors the worker holds, by slot name. trained: those of their factors (``a``, ``b``) that
            require a gradient, by slot name.
        when_sent: what to do once the worker has answered. brought: numbers of the shared tensors in ``extras``.
        added: what the enclave adds to the un-keyed output ``[..., out]``, from the reply's tensors and ``blind``.
        blind: bool ``[1 or B, T, 1]``, rows that attend to nothing, whose heads give 0; None where there are none.
        looked_at: whether other rows attend to one of these.
        check: verifies ``y = x W``, and the backward's ``dx = dy W^T``, of a linear segment without a LoRA slot.
    """

    session: Session
    segment: str
    layer: str
    tensors: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    header: dict[str, Any] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)
    factors: list[str] = field(default_factory=list)
    push: set[str] = field(default_factory=set)
    held: dict[str, Held] = field(default_factory=dict)
    trained: dict[str, tuple[str, ...]] = field(default_factory=dict)
    when_sent: list[Callable[[], None]] = field(default_factory=list)
    brought: list[int] = field(default_factory=list)
    added: list[Callable[[dict[str, Tensor], Tensor | None], Tensor]] = field(default_factory=list)
    blind: Tensor | None = None
    looked_at: bool = False
    check: Check | None = None
    id: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """The one dtype of a call's tensors: PEFT keeps the adapter of a bfloat16 model in float32."""
        return self.tensors["x"].dtype

    @property
    def rows(self) -> tuple[int, ...]:
        """Shape of x without its last axis."""
        return tuple(self.tensors["x"].shape[:-1])

    def trains(self) -> bool:
        """Whether a gradient of anything in the call is wanted."""
        return torch.is_grad_enabled() and any(t.requires_grad for t in self._inputs().values())

    def run(self) -> dict[str, Tensor]:
        """Do the call and return the reply's tensors by name, differentiable where an input is."""
        if self.trains():
            inputs = self._inputs()
            origins = (origin(*inputs.values()),)  # within a tuple autograd does not see it
            outputs = _Remote.apply(  # type: ignore[no-untyped-call]
                self, origins, list(inputs), *inputs.values()
            )
            return dict(zip(self.shapes, outputs, strict=True))
        return self._forward(keep=False)

    def _inputs(self) -> dict[str, Tensor]:
        return {**self.tensors, **{f"anchor.{slot}": self.held[slot].anchor for slot in self.trained}}

    def _forward(self, *, keep: bool) -> dict[str, Tensor]:
        sent = {n: t.detach() for n, t in self.tensors.items() if n not in self.factors or n in self.push}
        header = {
            "segment": self.segment,
            "keep": keep,
            "factors": self.factors,
            "held": list(self.held),
            **self.header,
        }
        expected = {name: (shape, self.dtype) for name, shape in self.shapes.items()}
        try:
            reply, outputs = self.session.request("forward", self.layer, header, {**sent, **self.extras}, expected)
        except BaseException:  # the worker may have them all the same, and no later call will name them
            for number in self.brought:
                self.session.drop("shared", number)
            raise
        if self.check is not None:
            self.check.require(self.session, self.layer, sent["x"], outputs["y"])
        self.id = reply["id"]
        for tell in self.when_sent:
            tell()
        return outputs

    def _backward(
        self, wants: list[str], slots: list[str], grads: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the gradients of the tensors in ``wants`` and of the anchors of ``slots``, each by name."""
        scales = {slot: self.held[slot].begin_backward() for slot in slots}
        header = {
            "segment": self.segment,
            "call": self.id,
            "wants": wants,
            "fresh": [slot for slot, scale in scales.items() if scale is None],
            "scales": {slot: scale for slot, scale in scales.items() if scale not in (None, 1.0)},
        }
        if self.held:  # left out, it would be all
            header["accumulate"] = [f"{slot}.{factor}" for slot in slots for factor in self.trained[slot]]
        expected = {name: (tuple(self.tensors[name].shape), self.tensors[name].dtype) for name in wants}
        pending = self.session.submit("backward", self.layer, header, grads, expected)
        try:
            reply, found = pending.result()
            if self.check is not None:
                self.check.require(self.session, self.layer, grads["y"], found["x"], transpose=True)
            norms = reply.get("gradient_norms")
            if not isinstance(norms, dict):
                raise self.session.fault("gradient norms", self.layer, got=type(norms).__name__, expected="map")
            anchors = {}
            for slot in slots:
                anchors[f"anchor.{slot}"] = self.held[slot].take_norm(norms.get(slot, "none"), self.trained[slot])
        except BaseException:  # who skips this pass and steps would step with what the worker added in it
            for slot in slots:
                self.held[slot].lose_gradient()
            raise
        return found, anchors


class _Lease:
    """Tells the worker to forget a call, unless its backward was asked for."""

    def __init__(self, call: RemoteCall) -> None:
        self._call: RemoteCall | None = call
        self._layer = call.layer

    def consume(self) -> RemoteCall:
        call, self._call = self._call, None
        if call is None:
            raise UnsupportedModelError(
                "backward a second time through what the worker computed, which forgets a call at its first backward",
                where=self._layer,
                hint="call backward once for the sum of losses, or the model once for each; strict takes retain_graph",
            )
        return call

    def __del__(self) -> None:
        if self._call is not None:
            self._call.session.drop("calls", self._call.id)


class _Remote(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: RemoteCall, origins: tuple[Tensor], names: list[str], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        outputs = call._forward(keep=True)
        ctx.lease, ctx.origins, ctx.names = _Lease(call), origins, names
        return tuple(outputs[name] for name in call.shapes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        call: RemoteCall = ctx.lease.consume()
        needed = dict(zip(ctx.names, ctx.needs_input_grad[3:], strict=True))
        wants = [name for name in call.tensors if needed[name]]
        leaves = dict(zip(ctx.names, (node for node, _ in ctx.next_functions), strict=True))
        slots = [slot for slot in call.trained if is_wanted(leaves[f"anchor.{slot}"])]
        given = {n: grad.detach().contiguous() for n, grad in zip(call.shapes, grads, strict=True) if grad is not None}
        try:
            with torch.no_grad(), without_autocast():
                found, anchors = call._backward(wants, slots, given)
        except (UsageError, NotFiniteError):  # it may be that nothing was sent, and the worker still has the call
            call.session.drop("calls", call.id)
            raise
        gradients = [found.get(name, anchors.get(name)) for name in ctx.names]
        return None, None, None, *first_only(gradients, call.layer, *grads, *ctx.origins)
