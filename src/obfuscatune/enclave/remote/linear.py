"""Remote linear layers: ``y = x W + b`` with W on the worker, keyed on both sides; those that share x in one call."""

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from obfuscatune.enclave.freivalds import Check
from obfuscatune.enclave.keys import Key, decode_parts, encode
from obfuscatune.enclave.remote.calls import RemoteCall, version_of, without_autocast
from obfuscatune.enclave.remote.held import HeldSlot
from obfuscatune.enclave.remote.lora import SplitInput
from obfuscatune.enclave.remote.norms import FoldedNorm
from obfuscatune.enclave.remote.slot import Slot, State
from obfuscatune.enclave.remote.withdrawn import Withdrawn
from obfuscatune.enclave.session import Session
from obfuscatune.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True, repr=False)
class Placed:
    """A segment on the worker, and what the enclave needs to use it.

    Attributes:
        segment, path: its name on the worker, and in the model, for messages.
        key_in, key_out: of what enters and leaves. norm: that was folded into it, if any.
        dtype: of the model's weights; under autocast, rows may come in another.
    """

    session: Session
    segment: str
    path: str
    key_in: Key
    key_out: Key
    norm: FoldedNorm | None
    dtype: torch.dtype

    def rows(self, x: Tensor) -> Tensor:
        """Return what is keyed: x itself, or where its norm is folded the normalized rows that it came from."""
        return (x if self.norm is None else self.norm.rows_of(x, self.path)).to(self.dtype)


@dataclass(slots=True, repr=False)  # a repr would show activations
class _Results:
    """Outputs of one call, until each layer has taken its own.

    Attributes:
        copy: of an x that does not tell of changes in place, as it was made under ``inference_mode``.
        states: of the slots, which may be set otherwise before the next layer is called.
    """

    x: "weakref.ref[Tensor]"
    version: int
    copy: Tensor | None
    grad: bool
    states: list[State]
    outputs: dict[int, Tensor]

    def is_of(self, x: Tensor, states: list[State]) -> bool:
        """Whether x is the very tensor of the call, and unchanged, and what adapters add to it is too."""
        same = self.x() is x and self.version == version_of(x) and self.grad == torch.is_grad_enabled()
        same = same and all(now.is_as(then) for now, then in zip(states, self.states, strict=True))
        return same and (self.copy is None or torch.equal(self.copy, x))


class _Last(threading.local):
    """What came of the last call of a thread: several may run the model at once."""

    results: _Results | None = None


class LinearGroup(ABC):
    """Layers that share one input. The first that is asked for an x makes the call; the others take what came back.

    Args:
        widths: columns of each layer.
    """

    def __init__(self, placed: Placed, widths: Sequence[int]) -> None:
        self.placed, self.widths = placed, list(widths)
        self._last = _Last()

    def output(self, x: Tensor, member: int) -> Tensor:
        """Return ``x W`` ``[..., out]`` of one layer, its bias not added; x ``[..., in]``."""
        found, states = self._last.results, self.states() if len(self.widths) > 1 else []
        if found is None or member not in found.outputs or not found.is_of(x, states):
            with without_autocast():
                outputs = dict(enumerate(self._outputs_of(x)))
            copy = x.clone() if x.is_inference() and len(self.widths) > 1 else None
            found = _Results(weakref.ref(x), version_of(x), copy, torch.is_grad_enabled(), states, outputs)
            self._last.results = found
        y = found.outputs.pop(member)
        if not found.outputs:
            self._last.results = None
        return y

    def _outputs_of(self, x: Tensor) -> Sequence[Tensor]:
        """As `outputs`, also for a vector, which no call can be of, and where there are no rows to send."""
        if not x.numel():
            empty, width = x.to(self.placed.dtype), self.placed.key_in.size
            return [empty @ empty.new_zeros(()).expand(width, columns) for columns in self.widths]
        return self.outputs(x) if x.ndim > 1 else [y[0] for y in self.outputs(x[None])]

    def states(self) -> list[State]:
        """Return what LoRA slots would add now."""
        return []

    @abstractmethod
    def outputs(self, x: Tensor) -> Sequence[Tensor]:
        """Make the call, and return the un-keyed output of each layer, with what LoRA slots add to it.

        Nobody else has them, and none is a view for autograd: whoever gets one may change it, as OLMo clips q.
        """


class KeyedGroup(LinearGroup):
    """Sends ``x* = x R_in``, receives ``y* = x* W*`` with ``W* = R_in^-1 W R_out``, returns ``y* R_out^-1``.

    Args:
        check: verifies every product, where the profile says so. slots: LoRA that PEFT's own layers do not compute.
    """

    def __init__(self, placed: Placed, widths: Sequence[int], *, check: Check | None, slots: dict[int, Slot]) -> None:
        super().__init__(placed, widths)
        self._check, self.slots = check, slots
        for slot in slots.values():
            slot.called = True

    def states(self) -> list[State]:
        """Of its slots."""
        return [slot.state() for slot in self.slots.values()]

    def outputs(self, x: Tensor) -> Sequence[Tensor]:
        """Make the call for x ``[..., in]``."""
        placed = self.placed
        call = RemoteCall(
            placed.session,
            placed.segment,
            placed.path,
            tensors={"x": encode(placed.rows(x), placed.key_in)},
            shapes={"y": (*x.shape[:-1], placed.key_out.size)},
            check=self._check,
        )
        for slot in self.slots.values():
            slot.contribute(call, x)
        return decode_parts(call.run()["y"], placed.key_out)


class RemoteLinear(Withdrawn):
    """Stands for a linear layer of the model, or for the base layer within PEFT's LoRA layer.

    Args:
        path: of the layer in the model. group, member: the call that it takes part in, and its place there.
        bias: ``[out]``, in the enclave; with folded norms it holds the norm's bias too. None for none.
    """

    def __init__(self, path: str, group: LinearGroup, member: int, bias: Tensor | None) -> None:
        super().__init__(path)
        self.bias: Any = bias  # no buffer, as in `RemotePart`: what `protect` computes is this rank's own
        self.group, self.member = group, member
        slot = group.slots.get(member) if isinstance(group, KeyedGroup) else None
        if isinstance(slot, HeldSlot):
            self.anchor = slot.anchor
        self._split = slot if isinstance(slot, SplitInput) else None

    def _dtype(self) -> torch.dtype:
        return self.group.placed.dtype

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Return ``[..., out]`` for x ``[..., in]``.

        Raises:
            UnsupportedModelError: any other argument, as PEFT's hooks for one adapter a row put one here.
        """
        if kwargs:
            got = ", ".join(kwargs)
            raise UnsupportedModelError(
                "an argument that a linear layer does not have",
                got=got,
                where=self.path,
                hint="one adapter for all rows of a call",
            )
        y = self.group.output(x, self.member)
        # Columns of a larger tensor are no result of a linear layer: a model may look at it in another shape.
        y = y.contiguous() if self.bias is None else y + self.bias
        if self._split is not None:
            with without_autocast():
                late = self._split.late(x)
            y = y if late is None else y + late.to(y.dtype)
        return y
