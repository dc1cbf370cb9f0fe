"""All LoRA pairs that workers hold: PEFT's parameters follow them at each step, and no stock optimizer steps them."""

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from obfuscatune.enclave.remote.held import HeldSlot, stock_optimizer
from obfuscatune.enclave.session import Session
from obfuscatune.errors import UnsupportedModelError, UsageError
from obfuscatune.protocol.optimizers import OPTIMIZER_MOMENTS


class HeldAdapter:
    """All LoRA pairs that workers hold.

    Attributes:
        stale: whether a step began and PEFT's parameters do not have its result: it was interrupted, or not finite.
    """

    def __init__(self) -> None:
        self.slots: list[HeldSlot] = []
        self.stale = False
        self._keys = hashlib.sha256()
        self._paths: dict[int, str] = {}  # of layers, by id of a factor; the slots keep these alive

    def add(self, slot: HeldSlot, mark: bytes) -> None:
        """Take a slot; ``mark``: bytes drawn under the same label as its keys, and for nothing else.

        Raises:
            UnsupportedModelError: another slot has one of its factors, which the worker would train twice.
        """
        for parameter in slot.parameters():
            other = self._paths.setdefault(id(parameter), slot.layer.path)
            if other != slot.layer.path:
                raise UnsupportedModelError(
                    "one LoRA factor of two layers, which the worker would train twice",
                    got=other,
                    where=slot.layer.path,
                    hint="lora_placement='enclave'",
                )
        slot.pull_all = self.pull
        self.slots.append(slot)
        self._keys.update(mark)

    @property
    def keys(self) -> str:
        """A name of all keys of the slots: what was made under others is known by it. It tells nothing of them."""
        return self._keys.hexdigest()[:32]

    def refuse_stock_optimizers(self, own: type[Optimizer]) -> Any:
        """Refuse, before it steps, any other optimizer of this process that has an anchor or a factor.

        Without that a run of one step would train nothing, and say nothing.

        Args:
            own: the class of the optimizer that may. Returns a handle to end it.
        """

        def check(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if isinstance(optimizer, own):
                return
            held = {id(parameter): slot.layer.path for slot in self.slots for parameter in slot.parameters()}
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if id(parameter) in held:
                        raise stock_optimizer(held[id(parameter)])

        return register_optimizer_step_pre_hook(check)

    def by_session(self) -> dict[Session, list[HeldSlot]]:
        """Return the slots of each worker."""
        found: dict[Session, list[HeldSlot]] = {}
        for slot in self.slots:
            found.setdefault(slot.session, []).append(slot)
        return found

    def export(self) -> dict[str, Tensor]:
        """Return the workers' keyed factors and moments by name.

        Raises:
            WorkerFault: a factor is missing, or what comes is of another shape or dtype than its factor.
        """
        asked = []
        for session, slots in self.by_session().items():
            factors = {name: kind for slot in slots for name, kind in slot.factors().items()}
            state = {f"{name}/{moment}": kind for name, kind in factors.items() for moment in OPTIMIZER_MOMENTS}
            state |= {f"{name}/step": ((), torch.float32) for name in factors}
            asked.append(session.submit("optimizer", "-", {"action": "export"}, {}, factors, optional=state))
        return {name: tensor for pending in asked for name, tensor in pending.result()[1].items()}

    def fitting(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Send what was written, and return an optimizer's state without the factors that PEFT's layers have not."""
        others = set()
        for slot in self.slots:
            slot.push()
            names = {f"{slot.full_name}.{factor}": factor for factor in "ab"}
            others |= {name for name, factor in names.items() if name in state and not slot.has(factor, state[name])}
        return {name: tensor for name, tensor in state.items() if name not in others}

    def pull(self) -> None:
        """Fetch the result of a step that did not bring it.

        Raises:
            UsageError: values were written since, and which of the two are meant nobody can tell.
            WorkerFault: as `export`.
            NotFiniteError: the step's result is not finite.
        """
        if not self.stale:
            return
        for slot in self.slots:
            if slot.lags():
                raise UsageError(
                    "LoRA that the worker trains was written to after a step that failed",
                    where=slot.layer.path,
                    hint="load the state of its optimizer, which has the factors, or protect the model anew",
                )
        self.fetch()

    def fetch(self) -> None:
        """Write the worker's factors into PEFT's layers, where it has changed them.

        Raises:
            WorkerFault: as `export`.
        """
        tensors = self.export()
        for slot in self.slots:
            slot.pull(tensors)
        self.stale = False


def part_of(slots: list[HeldSlot], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of the factors and moments that belongs to some slots: no worker speaks for another one's."""
    names = {slot.full_name for slot in slots}  # of SLOT.a, SLOT.b and SLOT.a/MOMENT
    return {name: tensor for name, tensor in state.items() if name.partition("/")[0].rpartition(".")[0] in names}
