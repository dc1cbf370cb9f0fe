"""One session of a worker: segments, kept calls and KV caches of one connected enclave, and the operations on them.

A request is a header and tensors; its answer likewise. A request that is not a valid one is a :class:`ProtocolError`
with a message of names and shapes, which the server sends back; the session goes on.
"""

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from obfuscatune.errors import ProtocolError
from obfuscatune.protocol.arena import PLACED
from obfuscatune.protocol.bits import unpack_mask
from obfuscatune.protocol.connection import Connection
from obfuscatune.protocol.expand import tensors_drawn
from obfuscatune.protocol.frames import PROTOCOL_VERSION
from obfuscatune.protocol.limits import Limits
from obfuscatune.protocol.memory import peak_memory_bytes
from obfuscatune.worker.adapters import HeldFactors, SlotInputs, factors_named
from obfuscatune.worker.attention import AttentionSegment
from obfuscatune.worker.body import BodySegment
from obfuscatune.worker.budget import Ledger, free_bytes
from obfuscatune.worker.kv import Tokens
from obfuscatune.worker.optimizer import HeldOptimizer
from obfuscatune.worker.parallel import ALONE, Group, ends_the_group
from obfuscatune.worker.residues import ResidueSegment
from obfuscatune.worker.segments import Call, LinearSegment, MlpSegment, Segment
from obfuscatune.worker.shelf import Reply, Shelf
from obfuscatune.worker.transfer import to_device, to_host

SEGMENTS: dict[str, type[Segment]] = {
    "linear": LinearSegment,
    "mlp": MlpSegment,
    "attention": AttentionSegment,
    "body": BodySegment,
    "residues": ResidueSegment,
}


class WorkerSession:
    """Serves the requests of one enclave.

    Args:
        device: where weights live and products are computed.
        budget: bytes that the session may hold there; None: it may take what there is.
        group: of the processes that share the weights. Rank 0 hands every request on to the others.
        passing: the connection, where an enclave of this machine can pass an arena over it.

    Attribute ``ledger``: what it holds, counted.
    """

    def __init__(
        self,
        device: torch.device,
        budget: int | None = None,
        group: Group = ALONE,
        passing: Connection | None = None,
    ) -> None:
        self.device, self.ledger, self.group = device, Ledger(budget), group
        # Another process of a group has not the arena.
        self._shelf = Shelf(passing if group.size == 1 else None, self.ledger, self.device)
        self._segments: dict[str, Segment] = {}
        self._pushed: dict[str, dict[str, Tensor]] = {}
        self._calls: dict[int, tuple[Segment, dict[str, Tensor], dict[str, Tensor]]] = {}
        self._caches: dict[int, dict[str, tuple[Tokens, ...]]] = {}
        self._shared: dict[int, tuple[Tensor, ...]] = {}
        self._optimizer = HeldOptimizer()
        self._busy_seconds = 0.0
        self._operations = {
            "hello": self._hello,
            "arena": self._shelf.take,
            "define": self._define,
            "hold": self._hold,
            "forward": self._forward,
            "backward": self._backward,
            "multiply": self._multiply,
            "optimizer": self._optimize,
            "stats": self._stats,
        }

    def handle(self, header: dict[str, Any], tensors: dict[str, Tensor]) -> Reply:
        """Answer one request.

        Raises:
            ProtocolError: it is not a valid one.
            GroupError: another process of the group is gone, or this one has failed where the others may have not.
        """
        self.group.hand_on(header, tensors)
        try:
            return self._handle(header, tensors)
        except Exception as error:
            if self.group.size > 1 and (lost := ends_the_group(error)) is not None:
                raise lost from error
            raise

    def _handle(self, header: dict[str, Any], tensors: dict[str, Tensor]) -> Reply:
        operation = self._operations.get(header.get("op", ""))
        if operation is None:
            raise ProtocolError("operation", got=repr(header.get("op"))[:40], expected=", ".join(self._operations))
        drop = header.get("drop") or {}
        if not isinstance(drop, dict):
            raise ProtocolError("what to drop", got=type(drop).__name__, expected="map")
        for number in drop.get("calls", ()):
            self._calls.pop(number, None)
            self.ledger.drop(("call", number))
        for number in drop.get("caches", ()):
            for segment in self._caches.pop(number, ()):
                self.ledger.drop(("cache", number, segment))
        for number in drop.get("shared", ()):
            self._shared.pop(number, None)
            self.ledger.drop(("shared", number))
        if "drawn" in header:
            most = Limits().max_payload_bytes
            most = most if self.ledger.budget is None else min(most, max(0, self.ledger.budget - self.ledger.held))
            made = tensors_drawn(header["drawn"], most)
            if not made.keys().isdisjoint(tensors):
                raise ProtocolError("tensors to draw", got=sorted(made), expected="others than those that are sent")
            tensors = {**tensors, **made}
        if ("placed" in header or "places" in header) and header["op"] not in PLACED:
            raise ProtocolError("placed tensors", got=header["op"], expected=" or ".join(PLACED))
        if "placed" in header:
            tensors = {**tensors, **self._shelf.read(header, tensors)}
        reply, outputs = operation(header, to_device(tensors, self.device))
        outputs = to_host(outputs, self.device)
        return self._shelf.place(header, reply, outputs) if "places" in header else (reply, outputs)

    def _hello(self, header: dict[str, Any], tensors: dict[str, Tensor]) -> Reply:
        threads = torch.get_num_threads()
        memory = free_bytes(self.device) if self.ledger.budget is None else self.ledger.budget
        memory *= self.group.size  # each process has its part of the weights
        told = {"version": PROTOCOL_VERSION, "device": str(self.device), "threads": threads, "memory_bytes": memory}
        told["arena"] = self._shelf.is_offered
        return told, {}

    def _define(self, header: dict[str, Any], tensors: dict[str, Tensor]) -> Reply:
        name, kind, spec = header.get("segment"), header.get("kind"), header.get("spec")
        if not isinstance(name, str) or name in self._segments:
            raise ProtocolError("segment name", got=repr(name)[:40], expected="a new one")
        if kind not in SEGMENTS or not isinstance(spec, dict):
            raise ProtocolError("kind of segment", got=repr(kind)[:40], expected=", ".join(SEGMENTS))
        segment = SEGMENTS[kind](spec, tensors, self._segments, self.group)
        self.ledger.hold(("segment", name), segment.weight.values())
        self._segments[name] = segment
        self._pushed[name] = {}
        return {}, {}

    def _hold(self, header: dict[str, Any], tensors: dict[str, Tensor]) -> Reply:
        """Take a pair of LoRA factors to train here, or new values for one that is here already."""
        segment, slot = self._segment(header), header.get("slot")
        if slot not in segment.slots or set(tensors) != {"a", "b"}:
            raise ProtocolError("factors to hold", got=repr(slot)[:40], expected=f"a and b of {segment.slots}")
        if slot in segment.held:
            held = segment.held[slot]
            with torch.no_grad():
                held.a.copy_(tensors["a"])
                held.b.copy_(tensors["b"])
            held.scale = float(header.get("scale", held.scale))
        else:
            self.ledger.hold(("held", header["segment"], slot), tensors.values())
            segment.held[slot] = HeldFactors(tensors["a"], tensors["b"], float(header.get("scale", 1.0)))
            self._optimizer.add(f"{header['segment']}.{slot}", segment.held[slot])
        return {}, {}

    def _forward(self, header: dict[str, Any], tensors: dict[str, Tensor]) -> Reply:
        segment = self._segment(header)
        pushed = self._pushed[header["segment"]]
        x = tensors.pop("x", None)
        if x is None or x.ndim < 2:
            raise ProtocolError("input x", got="none or a vector", expected="[..., width]")
        call = Call(recompute=bool(header.get("recompute")))
        if (field := header.get("mask")) is not None:
            mask = (unpack_mask(tensors.pop("mask"), field["shape"]),) if "mask" in tensors else None
            call.mask, call.uniform = self._share(field, mask)[0], bool(field.get("uniform"))
        if (field := header.get("rotary")) is not None:
            tables = (tensors.pop("cos"), tensors.pop("sin")) if "cos" in tensors else None
            cos, sin = self._share(field, tables)
            call.rotary = cos, sin
        for name in [n for n in tensors if n[:2] in ("A.", "B.", "c.")]:
            self.ledger.hold(("pushed", header["segment"], name), [tensors[name]])
            pushed[name] = tensors.pop(name)
        used = {name: pushed[name] for name in header.get("factors", ())}
        leaves = {"x": x, **tensors, **used}
        keep = bool(header.get("keep"))
        if keep:
            leaves = {n: t.detach().requires_grad_() for n, t in leaves.items()}
        cache = header.get("cache")
        if cache is not None:
            call.past = self._past(header["segment"], cache)
        slots = SlotInputs(leaves, {slot: segment.held[slot] for slot in header.get("held", ())})
        with torch.set_grad_enabled(keep):
            y = segment.run(leaves["x"], slots, call)
        outputs = {"y": y, **slots.outputs}
        if cache is not None and call.present is not None:
            buffers = [buffer for tokens in call.present for buffer in tokens.buffers]
            self.ledger.hold(("cache", cache["id"], header["segment"]), buffers)
            self._caches.setdefault(cache["id"], {})[header["segment"]] = call.present
        if keep:
            self.ledger.hold(("call", header["id"]), [*leaves.values(), *outputs.values()])
            self._calls[header["id"]] = (segment, leaves, outputs)
        return {}, {name: tensor.detach() for name, tensor in outputs.items()}

    def _share(self, field: dict[str, Any], new: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """What all calls of a pass share under a number: the first of them brings it, as ``new``."""
        if new is not None:
            self.ledger.hold(("shared", field["id"]), new)
            self._shared[field["id"]] = new
        if field["id"] not in self._shared:
            raise ProtocolError("shared tensor", got=repr(field["id"])[:20], expected="one that was sent")
        return self._shared[field["id"]]

    def _past(self, segment: str, cache: dict[str, Any]) -> tuple[Tokens, ...] | None:
        """Keys and values of ``length`` cached tokens, rows gathered as the request says (beam search)."""
        start, length, rows = cache["start"], cache["length"], cache["rows"]
        if not length:
            return None
        stored = self._caches.get(cache["id"], {}).get(segment)
        if stored is None or not 0 <= start <= stored[0].length - length:
            raise ProtocolError("KV cache", got="none or a shorter one", expected=f"{length} tokens from {start} on")
        return tuple(tokens.part(start, length, rows) for tokens in stored)

    def _backward(self, header: dict[str, Any], tensors: dict[str, Tensor]) -> Reply:
        kept = self._calls.pop(header.get("call", -1), None)
        if kept is None:
            raise ProtocolError("backward of a call", got=header.get("call"), expected="one that is kept")
        self.ledger.drop(("call", header["call"]))
        segment, leaves, outputs = kept
        grads = {name: tensor for name, tensor in tensors.items() if name in outputs}
        wants = list(header.get("wants", ()))
        if not set(wants) <= set(leaves) or set(grads) != set(tensors) or not grads:
            raise ProtocolError("gradients of a call", got=[*wants, *tensors], expected=[*leaves, *outputs])
        held = factors_named(segment.held, header.get("accumulate"))
        targets = [leaves[name] for name in wants] + held
        found = torch.autograd.grad(
            [outputs[n] for n in grads], targets, list(grads.values()), allow_unused=True, materialize_grads=True
        )
        for slot in header.get("fresh", ()):
            segment.held[slot].clear()
        for slot, scale in header.get("scales", {}).items():
            segment.held[slot].scale_gradient(scale)
        for parameter, grad in zip(held, found[len(wants) :], strict=True):
            parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        found_norms = {slot: factors.gradient_norm() for slot, factors in segment.held.items()}
        norms = {slot: n if math.isfinite(n) else None for slot, n in found_norms.items()}  # no header holds others
        return {"gradient_norms": norms}, dict(zip(wants, found, strict=False))

    def _multiply(self, header: dict[str, Any], tensors: dict[str, Tensor]) -> Reply:
        """Multiply rows by a linear segment's weight, or its transpose; nothing is kept."""
        segment, transpose = self._segment(header), header.get("transpose")
        if (
            not isinstance(segment, LinearSegment | ResidueSegment)
            or set(tensors) != {"x"}
            or not isinstance(transpose, bool)
        ):
            raise ProtocolError(
                "product", got=sorted(tensors), expected="x, for a linear segment or a share, and transpose"
            )
        started = time.perf_counter()
        if isinstance(segment, ResidueSegment):
            x = tensors["x"]
            shape = segment.shape_of_product(x, transpose=transpose)
            place = self._shelf.place_of(header, "y", torch.int8, shape) if x.is_cpu else None
            y = segment.multiply(x, transpose=transpose, out=place)
        else:
            y = segment.multiply(tensors["x"], transpose=transpose)
        self._busy_seconds += time.perf_counter() - started
        return {}, {"y": y}

    def _optimize(self, header: dict[str, Any], tensors: dict[str, Tensor]) -> Reply:
        answer = self._optimizer.handle(header, tensors)
        self.ledger.hold("optimizer", self._optimizer.state())
        return answer

    def _stats(self, header: dict[str, Any], tensors: dict[str, Tensor]) -> Reply:
        numbers = {
            "peak_memory_bytes": peak_memory_bytes(),
            "kept_calls": len(self._calls),
            "caches": len(self._caches),
            "busy_seconds": self._busy_seconds,
            "held_bytes": self.ledger.held,
        }
        return numbers, {}

    def _segment(self, header: Mapping[str, Any]) -> Segment:
        segment = self._segments.get(header.get("segment", ""))
        if segment is None:
            raise ProtocolError("segment", got=repr(header.get("segment"))[:40], expected="one that was defined")
        return segment
