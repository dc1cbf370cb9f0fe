"""LoRA factors that the worker holds and trains (``lora_placement="worker"``, as the paper has it).

Stock training code wants parameters with gradients. Each such slot has an *anchor* in the enclave: a parameter of two
numbers whose gradient has the Euclidean **norm** of the gradient that the worker has accumulated for the slot, and a
fixed direction. Under orthogonal keys that norm equals the one in plain coordinates, so that ``clip_grad_norm_`` over
the anchors computes the true global norm and scales the anchors' gradients; :class:`RemoteOptimizer` reads the factor
off them and sends it along with the step. What does not scale a gradient as a whole (``clip_grad_value_``, noise) turns
it away from that direction, and is refused.
"""

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from obfuscatune.enclave.families import Layer
from obfuscatune.enclave.families.form import refuse_variants
from obfuscatune.enclave.folding import key_rows, unkey_rows
from obfuscatune.enclave.keys import Key
from obfuscatune.enclave.remote.calls import RemoteCall
from obfuscatune.enclave.remote.lora import Slot
from obfuscatune.enclave.remote.passes import Passes
from obfuscatune.enclave.session import Session
from obfuscatune.errors import UsageError
from obfuscatune.protocol.optimizers import OPTIMIZER_OPTIONS

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
# Of an anchor's gradient. Nearly all in one number, so that a bound on each number that does nothing there does nothing
# to a gradient of that norm either.
_SMALL = 1e-4
_DIRECTION = torch.tensor([math.sqrt(1 - _SMALL**2), _SMALL], dtype=torch.float64)
_TURNED = 1e-9  # relative; 1e-12 would be rounding


class HeldSlot(Slot):
    """One LoRA pair on the worker, and its twin in PEFT's layer, which is updated when the adapter is read.

    Keyed coordinates: ``A* = R_in^-1 A``, ``B* = B R_out`` (A ``[in, r]``, B ``[r, out]``).

    Args:
        segment, name: where it is on the worker.
        layer: with PEFT's layer around it, whose parameters are ``[r, in]`` and ``[out, r]``, with a factor on the
            product; its active adapter is the one that is trained and used.
    """

    def __init__(
        self,
        name: str,
        layer: Layer,
        session: Session,
        passes: Passes,
        *,
        segment: str,
        key_in: Key,
        key_out: Key,
    ) -> None:
        super().__init__(name, layer)
        self.full_name = f"{segment}.{name}"
        self.owner: HeldAdapter | None = None
        self._adapter: str = self.lora.active_adapters[0]
        self._a, self._b = self.lora.lora_A[self._adapter].weight, self.lora.lora_B[self._adapter].weight
        # Float64: the clipping factor is a quotient of two norms, and must be exactly 1 where nothing is clipped.
        self.anchor = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.norm = 0.0
        self.session, self._passes, self._segment = session, passes, segment
        self._key_in, self._key_out = key_in, key_out
        self._last_pass = self._compared = -1
        self._synced: tuple[Tensor, Tensor] | None = None
        self._scaling = math.nan
        self.push()

    def take_over(self) -> None:
        """Freeze PEFT's parameters: from here on the worker trains."""
        for parameter in (self._a, self._b):
            parameter.requires_grad_(False)

    def push(self) -> None:
        """Send PEFT's values, keyed, and their scale, where they are not the ones last exchanged (others were loaded).

        Raises:
            UsageError: they have another shape or dtype than those on the worker.
        """
        scaling = self.scaling()
        if scaling == self._scaling and not self.lags():
            return
        a = unkey_rows(self._a.detach().double().T, self._key_in)
        b = self._key_out.apply(self.layer.canonical(self._b.detach().double().T.contiguous()))
        tensors = {"a": a.to(self._a.dtype).contiguous(), "b": b.to(self._b.dtype).contiguous()}
        header = {"segment": self._segment, "slot": self.name, "scale": scaling}
        self.session.request("hold", self.layer.path, header, tensors, {})
        self._scaling = scaling
        self._remember()

    def scaling(self) -> float:
        """The factor on the product, as PEFT's layer has it now."""
        return float(self.lora.scaling[self._adapter])

    def lags(self) -> bool:
        """Whether the worker lacks values that were written to PEFT's layer."""
        self._a, self._b = self.lora.lora_A[self._adapter].weight, self.lora.lora_B[self._adapter].weight
        if self._synced is None:
            return True
        for now, synced in zip((self._a, self._b), self._synced, strict=True):
            if now.shape != synced.shape or now.dtype != synced.dtype:
                raise UsageError(
                    "a LoRA factor that the worker trains was replaced by another kind of tensor",
                    got=f"{list(now.shape)} {now.dtype}",
                    expected=f"{list(synced.shape)} {synced.dtype}",
                    where=self.layer.path,
                    hint="load values of the same rank and dtype, or protect the model anew",
                )
        return not (torch.equal(self._a, self._synced[0]) and torch.equal(self._b, self._synced[1]))

    def pull(self, exported: dict[str, Tensor]) -> None:
        """Write the worker's keyed factors into PEFT's parameters, un-keyed.

        Raises:
            WorkerFault: they are not there, or not of their shapes and dtype.
        """
        keyed_a, keyed_b = (exported.get(f"{self.full_name}.{factor}") for factor in "ab")
        if keyed_a is None or keyed_b is None:
            raise self.session.fault("a factor of a held slot is missing", self.layer.path)
        for keyed, parameter in ((keyed_a, self._a), (keyed_b, self._b)):
            if keyed.shape != parameter.T.shape or keyed.dtype != parameter.dtype:
                got, expected = f"{list(keyed.shape)} {keyed.dtype}", f"{list(parameter.T.shape)} {parameter.dtype}"
                raise self.session.fault("factor of a held slot", self.layer.path, got=got, expected=expected)
        with torch.no_grad():
            self._a.copy_(key_rows(keyed_a.double(), self._key_in).T)
            self._b.copy_(self.layer.stored(self._key_out.apply_inverse(keyed_b.double())).T)
        self._remember()

    def _remember(self) -> None:
        self._synced = (self._a.detach().clone(), self._b.detach().clone())

    def contribute(self, call: RemoteCall, x: Tensor | None) -> None:
        """Let the worker add its product; sends values that were loaded since, looked for once in each pass.

        Raises:
            UsageError: the anchor was stepped by a stock optimizer, or another adapter was chosen.
        """
        self.refuse_hooks()
        names = self.in_use()
        if not names:
            return
        if list(names) != [self._adapter]:
            raise UsageError(
                "adapter in use is not the one on the worker",
                got=names,
                expected=self._adapter,
                where=self.layer.path,
                hint="lora_placement='enclave' takes any adapter on these layers; here it is the one of `protect`",
            )
        refuse_variants(self.lora, self.layer.path, [self._adapter])
        self.refuse_code_within(self._adapter)
        if self._compared != self._passes.number or self.scaling() != self._scaling:
            if self.anchor.any():
                raise stock_optimizer(self.layer.path)
            if self.scaling() != self._scaling and self.owner is not None:
                self.owner.pull()  # for a scale alone the values there are sent back
            self.push()
            self._compared = self._passes.number
        call.held[self.name] = self

    def begin_backward(self) -> bool:
        """Whether the worker shall clear this slot's gradient before it adds to it: the anchor's was cleared since.

        Asked here and not in the forward, because training code may call ``zero_grad`` between the two. Within one
        backward pass autograd sums the increments of all calls first, so there an empty gradient means nothing.
        """
        cleared = self.anchor.grad is None or not self.anchor.grad.any()
        fresh = cleared and self.norm > 0.0 and self._last_pass != _backward_pass()
        if fresh:
            self.norm = 0.0
        return fresh

    def take_norm(self, norm: Any) -> Tensor:
        """Return the increment of the accumulated gradient's norm, the anchor's gradient. Refuses what is no norm."""
        if not isinstance(norm, float | int) or not math.isfinite(norm) or norm < 0:
            raise self.session.fault("gradient norm of a held slot", self.layer.path)
        increment, self.norm = norm - self.norm, float(norm)
        self._last_pass = _backward_pass()
        return increment * _DIRECTION

    def scale(self) -> float | None:
        """What the gradient on the worker is multiplied with before a step, as clipping did here; None without one.

        Raises:
            UsageError: it was changed otherwise than by a factor.
        """
        if self.anchor.grad is None:
            return None
        return self._length(self.anchor.grad) / self.norm if self.norm > 0.0 else 1.0

    def stepped(self) -> None:
        """Note that the worker scaled its gradient, or dropped it, as :meth:`scale` said."""
        self.norm = 0.0 if self.anchor.grad is None else self._length(self.anchor.grad)

    def _length(self, gradient: Tensor) -> float:
        """Signed length of a gradient along `_DIRECTION`."""
        length = float(gradient @ _DIRECTION)
        if not torch.allclose(gradient, length * _DIRECTION, rtol=_TURNED, atol=_TURNED * _SMALL * abs(length)):
            raise UsageError(
                "the gradient of LoRA that the worker trains was changed otherwise than by one factor",
                where=self.layer.path,
                hint="clip_grad_norm_ instead of clip_grad_value_; noise on gradients needs lora_placement='enclave'",
            )
        return length


def stock_optimizer(where: str) -> UsageError:
    """Return what an optimizer of the enclave's is refused with."""
    return UsageError(
        "an optimizer of the enclave was to step a LoRA pair that the worker trains",
        where=where,
        hint="pass protected.create_optimizer(...) to the Trainer: optimizers=(optimizer, None)",
    )


def _backward_pass() -> int:
    """Number of the backward pass that runs; torch has no public name for it."""
    return torch._C._current_graph_task_id()


class HeldAdapter:
    """All LoRA pairs that workers hold, and whether PEFT's parameters lag behind them."""

    def __init__(self) -> None:
        self.slots: list[HeldSlot] = []
        self.stale = False
        self._keys = hashlib.sha256()

    def add(self, slot: HeldSlot, mark: bytes) -> None:
        """Take a slot; ``mark``: bytes drawn under the same label as its keys, and for nothing else."""
        slot.owner = self
        self.slots.append(slot)
        self._keys.update(mark)

    @property
    def keys(self) -> str:
        """A name of all keys of the slots: what was made under others is known by it. It tells nothing of them."""
        return self._keys.hexdigest()[:32]

    def refuse_stock_optimizers(self) -> Any:
        """Refuse, before it steps, any other optimizer of this process that has an anchor; returns a handle to end it.

        Without that a run of one step would train nothing, and say nothing.
        """
        anchors = {id(slot.anchor): slot.layer.path for slot in self.slots}

        def check(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if isinstance(optimizer, RemoteOptimizer):
                return
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if id(parameter) in anchors:
                        raise stock_optimizer(anchors[id(parameter)])

        return register_optimizer_step_pre_hook(check)

    def by_session(self) -> dict[Session, list[HeldSlot]]:
        """Return the slots of each worker."""
        found: dict[Session, list[HeldSlot]] = {}
        for slot in self.slots:
            found.setdefault(slot.session, []).append(slot)
        return found

    def export(self) -> dict[str, Tensor]:
        """Return the workers' keyed factors and moments by name."""
        header = {"action": "export"}
        asked = {session.submit("optimizer", "-", header, {}, None): own for session, own in self.by_session().items()}
        return {
            name: tensor for pending, own in asked.items() for name, tensor in _of(own, pending.result()[1]).items()
        }

    def pull(self) -> None:
        """Bring the adapter in PEFT's layers up to date with the worker's factors, if it is not.

        Values loaded into PEFT's layers since the last exchange are the newer ones, and go to the worker first.
        """
        if self.stale:
            for slot in self.slots:
                if slot.lags():
                    slot.push()
            self.fetch()

    def fetch(self) -> None:
        """Write the worker's factors into PEFT's layers.

        Raises:
            WorkerFault: the worker's factors are not all there, or not of their shapes.
        """
        tensors = self.export()
        for slot in self.slots:
            slot.pull(tensors)
        self.stale = False


def _of(slots: list[HeldSlot], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of the factors and moments that belongs to some slots: no worker speaks for another one's."""
    names = {slot.full_name for slot in slots}  # of SLOT.a, SLOT.b and SLOT.a/MOMENT
    return {name: tensor for name, tensor in state.items() if name.partition("/")[0].rpartition(".")[0] in names}


class RemoteOptimizer(Optimizer):
    """Steps the factors that the worker holds, and what is trained in the enclave beside them.

    A stock torch optimizer to schedulers and to the Trainer.

    Args:
        adapter: the held slots. local: trained parameters of the enclave (blocks that stay inside, a trained head).
        kind: ``adamw`` or ``sgd``. lr: learning rate.
        options: further arguments of that torch optimizer (weight_decay, betas, momentum, ...).

    ``state_dict`` carries the keyed factors and moments, so that a resumed run continues bit for bit under the same
    keys.
    """

    def __init__(
        self, adapter: HeldAdapter, local: list[nn.Parameter], *, kind: str, lr: float, **options: Any
    ) -> None:
        unknown = sorted(options.keys() - OPTIMIZER_OPTIONS[kind])
        if unknown:
            expected = f"some of {', '.join(sorted(OPTIMIZER_OPTIONS[kind]))}"
            raise UsageError("option of an optimizer on the worker", got=", ".join(unknown), expected=expected)
        self._adapter, self._kind = adapter, kind
        self._options = {"lr": lr, **{n: list(v) if isinstance(v, tuple) else v for n, v in options.items()}}
        self._local = OPTIMIZERS[kind](local, lr=lr, **options) if local else None
        super().__init__([*(slot.anchor for slot in adapter.slots), *local], {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step the factors of every slot that has a gradient, clipped as the anchors' gradients were."""
        scales = {slot.full_name: scale for slot in self._adapter.slots if (scale := slot.scale()) is not None}
        lr = float(self.param_groups[0]["lr"])
        header = {"action": "step", "kind": self._kind, "options": self._options, "lr": lr}
        asked = []
        for session, slots in self._adapter.by_session().items():
            own = {slot.full_name: scales[slot.full_name] for slot in slots if slot.full_name in scales}
            asked.append(session.submit("optimizer", "-", {**header, "scales": own}, {}, {}))
        for pending in asked:
            pending.result()
        for slot in self._adapter.slots:
            slot.stepped()
        self._adapter.stale = True
        if self._local is not None:
            self._local.param_groups[0]["lr"] = lr
            self._local.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the schedule's state and, keyed, the factors and moments on the worker."""
        local = None if self._local is None else self._local.state_dict()
        return {**super().state_dict(), "worker": self._adapter.export(), "local": local, "keys": self._adapter.keys}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put both back.

        Raises:
            UsageError: the state was made under other keys, under which it means something else.
        """
        state = dict(state_dict)
        if state.pop("keys", None) != self._adapter.keys:
            raise UsageError(
                "state of an optimizer whose factors were keyed otherwise",
                expected="the secret, profile and weights under which it was saved",
                hint="protect(model, secret=protected.secret of that session), which a checkpoint holds",
            )
        tensors, local = state.pop("worker"), state.pop("local")
        if self._local is not None:
            self._local.load_state_dict(local)
        super().load_state_dict(state)
        header = {"action": "import", "kind": self._kind, "options": self._options}
        asked = []
        for session, slots in self._adapter.by_session().items():
            asked.append(session.submit("optimizer", "-", header, _of(slots, tensors), {}))
        for pending in asked:
            pending.result()
        self._adapter.fetch()
