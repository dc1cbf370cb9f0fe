"""LoRA on the worker's side: factors that the enclave pushes, and factors that the worker holds and trains.

A *slot* is one place in a segment where a low-rank product is added. What arrives for it decides how it is computed:

=====================  ==========================================  ==================================================
what the worker has    computation                                 who trains
=====================  ==========================================  ==================================================
``u`` and a pushed B   ``y += u B``, u = x A came from the enclave  the enclave (the gradients of u and B go back)
a pushed A             ``v = x A`` goes back beside y               the enclave (the gradient of A goes back)
a pushed A and B       ``y += (x A + c) B``, c pushed or nothing    the enclave (the gradients of all three go back)
A and B of its own     ``y += (x A) B * scale``                     the worker, in keyed coordinates
=====================  ==========================================  ==================================================
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class SlotInputs:
    """What one call brings for the slots of a segment, and what it takes back.

    Args:
        tensors: leaves of this call by wire name: ``u.<slot>``, ``B.<slot>``, ``A.<slot>``, ``c.<slot>``.
        held: the segment's own factors that this call uses, by slot.
        part: what stands before the names of the slots: ``3.`` for the fourth part of a body.
    """

    def __init__(self, tensors: dict[str, Tensor], held: "Mapping[str, HeldFactors]", part: str = "") -> None:
        self._tensors, self._held, self._part = tensors, held, part
        self.outputs: dict[str, Tensor] = {}

    def of_part(self, index: int) -> "SlotInputs":
        """Return the slots of one part of a body; what must go back is collected with that of the others."""
        inner = SlotInputs(self._tensors, self._held, f"{index}.")
        inner.outputs = self.outputs
        return inner

    def add(self, slot: str, x: Tensor, y: Tensor) -> Tensor:
        """Return ``y`` plus the slot's low-rank product of ``x``; a ``v`` that must go back is kept in ``outputs``."""
        slot = self._part + slot
        u, a, b, c = (self._tensors.get(f"{kind}.{slot}") for kind in "uABc")
        if u is not None and b is not None:
            return y + u @ b
        if a is not None and b is not None:
            low_rank = x @ a if c is None else x @ a + c
            return y + low_rank @ b
        if a is not None:
            self.outputs[f"v.{slot}"] = x @ a
        elif slot in self._held:
            return y + self._held[slot].product(x)
        return y


class HeldFactors:
    """A keyed LoRA pair that the worker holds: ``x A B scale``."""

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        self.a, self.b, self.scale = nn.Parameter(a), nn.Parameter(b), scale

    def product(self, x: Tensor) -> Tensor:
        """Return the low-rank product, of the shape of the segment's own output."""
        product = ((x.to(self.a.dtype) @ self.a) @ self.b) * self.scale  # PEFT's factors may be wider than the weights
        return product.to(x.dtype)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Both factors by name."""
        return {"a": self.a, "b": self.b}

    def gradient_norm(self) -> float:
        """Euclidean norm of the gradient accumulated so far over both factors; 0 before the first backward."""
        grads = [p.grad for p in (self.a, self.b) if p.grad is not None]
        return float(torch.stack([g.double().square().sum() for g in grads]).sum().sqrt()) if grads else 0.0
