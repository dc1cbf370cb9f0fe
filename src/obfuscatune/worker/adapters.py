"""LoRA on the worker's side: factors that the enclave pushes, and factors that the worker holds and trains.

A *slot* is one place in a segment where a low-rank product is added: ``in0``, ``in1``, ... of the layers that its first
product computes side by side, each with columns of its own, and ``out`` of its last one. What arrives for it decides
how it is computed:

=====================  ==========================================  ==================================================
what the worker has    computation                                 who trains
=====================  ==========================================  ==================================================
``u`` and a pushed B   ``y += u B``, u = x A came from the enclave  the enclave (the gradients of u and B go back)
a pushed A             ``v = x A`` goes back beside y               the enclave (the gradient of A goes back)
a pushed A and B       ``y += (x A + c) B``, c pushed or nothing    the enclave (the gradients of all three go back)
A and B of its own     ``y += (x A) B * scale``                     the worker, in keyed coordinates
=====================  ==========================================  ==================================================
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

LAST = "out"


def first_slots(count: int) -> tuple[str, ...]:
    """Names of the slots of so many layers side by side."""
    return tuple(f"in{i}" for i in range(count))


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

    def add_first(self, widths: Sequence[int], x: Tensor, y: Tensor) -> Tensor:
        """Return ``y`` plus the low-rank products of ``x`` of layers side by side, ``widths`` columns each."""
        if len(widths) == 1:
            return self.add("in0", x, y)
        low_ranks, factors = [], []
        for slot, width in zip(first_slots(len(widths)), widths, strict=True):
            found = self._pair(slot, x)
            low_ranks += [] if found is None else [found[0]]
            factors.append(x.new_zeros(0, width) if found is None else found[1])
        if low_ranks:
            y = y + torch.cat(low_ranks, dim=-1) @ torch.block_diag(*factors)  # type: ignore[no-untyped-call]
        held = [self._held.get(self._part + slot) for slot in first_slots(len(widths))]
        if any(held):
            parts = torch.split(y, list(widths), dim=-1)
            added = [p if h is None else p + h.product(x) for p, h in zip(parts, held, strict=True)]
            y = torch.cat(added, dim=-1)
        return y

    def add(self, slot: str, x: Tensor, y: Tensor) -> Tensor:
        """Return ``y`` plus the slot's low-rank product of ``x``; a ``v`` that must go back is kept in ``outputs``."""
        if (pair := self._pair(slot, x)) is not None:
            return y + pair[0] @ pair[1]
        slot = self._part + slot
        if (a := self._tensors.get(f"A.{slot}")) is not None:
            self.outputs[f"v.{slot}"] = x @ a
        elif slot in self._held:
            return y + self._held[slot].product(x)
        return y

    def _pair(self, slot: str, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """The low-rank numbers of ``x`` and B, where the slot adds their product here."""
        u, a, b, c = (self._tensors.get(f"{kind}.{self._part}{slot}") for kind in "uABc")
        if b is None:
            return None
        if u is not None:
            return u, b
        if a is None:
            return None
        return (x @ a if c is None else x @ a + c), b


class HeldFactors:
    """A keyed LoRA pair that the worker holds: ``x A B scale``."""

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        self.a, self.b, self.scale = nn.Parameter(a), nn.Parameter(b), scale

    def product(self, x: Tensor) -> Tensor:
        """Return the low-rank product, of the shape of the layer's own output."""
        product = ((x.to(self.a.dtype) @ self.a) @ self.b) * self.scale  # PEFT's factors may be wider than the weights
        return product.to(x.dtype)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Both factors by name."""
        return {"a": self.a, "b": self.b}

    def gradient_norm(self) -> float:
        """Euclidean norm of the gradient accumulated so far over both factors; 0 before the first backward."""
        grads = [p.grad for p in (self.a, self.b) if p.grad is not None]
        return float(torch.stack([g.double().square().sum() for g in grads]).sum().sqrt()) if grads else 0.0
