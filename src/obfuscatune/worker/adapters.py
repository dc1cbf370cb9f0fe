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
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from obfuscatune.errors import ProtocolError
from obfuscatune.worker.parallel import ALONE, Group

LAST = "out"


@dataclass(frozen=True, slots=True, repr=False)
class Columns:
    """Which of a layer's columns are in this process: ``index``, int64; None for all ``count`` of them."""

    count: int
    index: Tensor | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """Return the columns of ``[..., all]`` that are here."""
        return tensor if self.index is None else tensor.index_select(-1, self.index)


def first_slots(count: int) -> tuple[str, ...]:
    """Names of the slots of so many layers side by side."""
    return tuple(f"in{i}" for i in range(count))


class SlotInputs:
    """What one call brings for the slots of a segment, and what it takes back.

    Args:
        tensors: leaves of this call by wire name: ``u.<slot>``, ``B.<slot>``, ``A.<slot>``, ``c.<slot>``.
        held: the segment's own factors that this call uses, by slot.
        part: what stands before the names of the slots: ``3.`` for the fourth part of a body.
        group: of the processes that share the weights; each has whole factors and uses its columns or rows of them.
    """

    def __init__(
        self, tensors: dict[str, Tensor], held: "Mapping[str, HeldFactors]", part: str = "", group: Group = ALONE
    ) -> None:
        self._tensors, self._held, self._part, self._group = tensors, held, part, group
        self.outputs: dict[str, Tensor] = {}

    def of_part(self, index: int) -> "SlotInputs":
        """Return the slots of one part of a body; what must go back is collected with that of the others."""
        inner = SlotInputs(self._tensors, self._held, f"{index}.", self._group)
        inner.outputs = self.outputs
        return inner

    def of_group(self, group: Group) -> "SlotInputs":
        """Return the same slots for a part that a group shares; what must go back is collected with the rest."""
        inner = SlotInputs(self._tensors, self._held, self._part, group)
        inner.outputs = self.outputs
        return inner

    def add_first(self, columns: Sequence[Columns], x: Tensor, y: Tensor) -> Tensor:
        """Return ``y`` plus the low-rank products of ``x`` of layers side by side, of each its columns here.

        A ``v`` that must go back is kept in ``outputs``.
        """
        names = first_slots(len(columns))
        low_ranks, factors = [], []
        for slot, here in zip(names, columns, strict=True):
            found = self._low_rank(slot, x)
            low_ranks += [] if found is None else [found[0]]
            factors.append(x.new_zeros(0, here.count) if found is None else here.of(found[1]))
        if len(low_ranks) == len(names) == 1:
            y = y + low_ranks[0] @ factors[0]
        elif low_ranks:
            y = y + torch.cat(low_ranks, dim=-1) @ torch.block_diag(*factors)  # type: ignore[no-untyped-call]
        held = [self._held.get(self._part + slot) for slot in names]
        if any(held):
            parts = torch.split(y, [here.count for here in columns], dim=-1)
            added = [
                p if h is None else p + h.product(x, self._group, columns=here)
                for p, h, here in zip(parts, held, columns, strict=True)
            ]
            y = added[0] if len(added) == 1 else torch.cat(added, dim=-1)
        return y

    def add_last(self, rows: Columns, hidden: Tensor, y: Tensor) -> Tensor:
        """Return ``y`` plus the low-rank product of the rows that are here, a term of the sum over the group.

        A ``v`` that must go back is kept in ``outputs``, summed.
        """
        slot, group = self._part + LAST, self._group
        u, a, b, c = self._entered(LAST)
        if b is not None and u is not None:
            return y + group.once(u) @ b
        if a is not None:
            v = hidden @ rows.of(a.T).T
            if b is not None:
                return y + (v if c is None else v + group.once(c)) @ b
            self.outputs[f"v.{slot}"] = group.leave(v)
        elif slot in self._held:
            return y + self._held[slot].product(hidden, group, rows=rows)
        return y

    def _low_rank(self, slot: str, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """The low-rank numbers of ``x`` and B, where the slot adds their product here."""
        u, a, b, c = self._entered(slot)
        if b is None:
            if a is not None:
                self.outputs[f"v.{self._part}{slot}"] = self._group.leave(self._group.once(x @ a))
            return None
        if u is not None:
            return u, b
        if a is None:
            return None
        return (x @ a if c is None else x @ a + c), b

    def _entered(self, slot: str) -> tuple[Tensor | None, ...]:
        found = (self._tensors.get(f"{kind}.{self._part}{slot}") for kind in "uABc")
        return tuple(None if tensor is None else self._group.enter(tensor) for tensor in found)


class HeldFactors:
    """A keyed LoRA pair that the worker holds: ``x A B scale``."""

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        self.a, self.b, self.scale = nn.Parameter(a), nn.Parameter(b), scale

    def product(
        self, x: Tensor, group: Group, *, columns: "Columns | None" = None, rows: "Columns | None" = None
    ) -> Tensor:
        """Return the low-rank product, of the shape of the layer's own output here."""
        a, b = group.enter(self.a), group.enter(self.b)
        a = a if rows is None else rows.of(a.T).T
        b = b if columns is None else columns.of(b)
        product = ((x.to(a.dtype) @ a) @ b) * self.scale  # PEFT's factors may be wider than the weights
        return product.to(x.dtype)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Both factors by name."""
        return {"a": self.a, "b": self.b}

    def clear(self) -> None:
        """Forget the gradient accumulated so far."""
        self.a.grad = self.b.grad = None

    def scale_gradient(self, scale: float) -> None:
        """Multiply the gradient accumulated so far."""
        for parameter in (self.a, self.b):
            if parameter.grad is not None:
                parameter.grad.mul_(scale)

    def gradient_norm(self) -> float:
        """Euclidean norm of the gradient accumulated so far over both factors; 0 before the first backward."""
        grads = [p.grad for p in (self.a, self.b) if p.grad is not None]
        return float(torch.stack([g.double().square().sum() for g in grads]).sum().sqrt()) if grads else 0.0


def factors_named(held: Mapping[str, HeldFactors], names: Sequence[str] | None) -> list[nn.Parameter]:
    """Return the factors of a segment by their names, ``<slot>.a`` and ``<slot>.b``; all of them for None.

    Raises:
        ProtocolError: one is not held.
    """
    known = {f"{slot}.{name}": p for slot, factors in held.items() for name, p in factors.parameters().items()}
    wanted = list(known) if names is None else list(dict.fromkeys(names))
    if not known.keys() >= set(wanted):
        raise ProtocolError("factors to train", got=repr(wanted)[:40], expected=f"some of {list(known)}"[:200])
    return [known[name] for name in wanted]
