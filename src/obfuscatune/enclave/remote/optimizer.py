"""The optimizer of LoRA factors that the worker holds (`held.py`), and of what the enclave trains beside them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from obfuscatune.enclave.remote.held_adapter import HeldAdapter, part_of
from obfuscatune.errors import UsageError
from obfuscatune.protocol.optimizers import OPTIMIZER_OPTIONS

_ANY = "lora_placement='enclave' takes any optimizer"

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


class RemoteOptimizer(Optimizer):
    """A stock torch optimizer to schedulers and to the Trainer; workers do its arithmetic on what they hold.

    Its first group has the anchors of all pairs of which a factor requires a gradient now. A group that is added is of
    parameters of the enclave. The settings of every group hold as they are at each step.

    Args:
        adapter: the held slots. local: trained parameters of the enclave (blocks that stay inside, a trained head).
        kind: ``adamw`` or ``sgd``. lr: learning rate.
        options: further arguments of that torch optimizer (weight_decay, betas, momentum, ...).

    A step is one of the values that PEFT's parameters have, and gives them the result.

    ``state_dict`` carries the keyed factors and moments, so that a resumed run continues bit for bit under the same
    keys.
    """

    def __init__(
        self, adapter: HeldAdapter, local: list[nn.Parameter], *, kind: str, lr: float, **options: Any
    ) -> None:
        unknown = sorted(options.keys() - OPTIMIZER_OPTIONS[kind])
        if unknown:
            expected = f"some of {', '.join(sorted(OPTIMIZER_OPTIONS[kind]))}"
            raise UsageError(
                "option of an optimizer on the worker", got=", ".join(unknown), expected=expected, hint=_ANY
            )
        stock = OPTIMIZERS[kind]([nn.Parameter(torch.zeros(1))], lr=lr, **options).defaults
        defaults = {name: value for name, value in stock.items() if name in OPTIMIZER_OPTIONS[kind]}
        self._others = {name: value for name, value in stock.items() if name not in defaults}
        self._adapter, self._kind = adapter, kind
        self._trained = {slot: frozenset(slot.trained()) for slot in adapter.slots}
        self._factors = {slot: dict(zip("ab", slot.parameters()[1:], strict=True)) for slot in adapter.slots}
        self._anchors = {id(slot.anchor) for slot, factors in self._trained.items() if factors}
        # Its groups are those of this one, without anchors.
        self._local = OPTIMIZERS[kind]([{"params": []}], **defaults)
        super().__init__([*(slot.anchor for slot in adapter.slots if self._trained[slot]), *local], defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train further parameters of the enclave.

        Raises:
            UsageError: the worker holds one of them.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if len(self.param_groups) == 1:
            self._local.param_groups[0]["params"] = self._of_enclave(group)
            return
        held = {id(parameter): slot.layer.path for slot in self._adapter.slots for parameter in slot.parameters()}
        for parameter in group["params"]:
            if id(parameter) in held:
                self.param_groups.pop()
                raise UsageError(
                    "a group of an optimizer with LoRA that the worker trains",
                    expected="parameters of the enclave; one group has all that the worker trains",
                    where=held[id(parameter)],
                    hint="lora_placement='enclave' takes any groups; call create_optimizer again after unfreezing",
                )
        self._local.add_param_group({name: value for name, value in group.items() if name != "param_names"})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the factors of every slot that has a gradient, clipped as the anchors' gradients were.

        Args:
            closure: evaluates the model anew, as torch's optimizers have it. Returns its loss.

        Raises:
            UsageError: a gradient was changed otherwise than by a factor, a factor was unfrozen or replaced since the
            optimizer was made, or a group has what a worker's optimizer has not. Nothing has been stepped then.
            NotFiniteError: a factor is not finite after the step; PEFT's parameters have the values from before it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._require_groups()
        scales = self._scales()
        options = self._options()
        header = {"action": "step", "kind": self._kind, "options": options, "lr": options["lr"]}
        self._adapter.pull()
        stepped = [slot for slot in self._adapter.slots if slot.full_name in scales]
        for slot in stepped:
            slot.before_step()
        self._adapter.stale = True  # until all of it has come
        asked = []
        for session, slots in self._adapter.by_session().items():
            own = {slot.full_name: scales[slot.full_name] for slot in slots if slot.full_name in scales}
            factors = {name: kind for slot in slots if slot.full_name in own for name, kind in slot.factors().items()}
            asked.append(session.submit("optimizer", "-", {**header, "scales": own}, {}, factors))
        for slot in self._adapter.slots:
            slot.stepped()
        found = {name: tensor for pending in asked for name, tensor in pending.result()[1].items()}
        for slot in stepped:
            slot.pull(found)
        self._adapter.stale = False
        for group, local in zip(self.param_groups, self._local.param_groups, strict=True):
            local.update({name: value for name, value in group.items() if name in self._local.defaults})
        self._local.step()
        return loss

    def _of_enclave(self, group: dict[str, Any]) -> list[nn.Parameter]:
        return [parameter for parameter in group["params"] if id(parameter) not in self._anchors]

    def _options(self) -> dict[str, Any]:
        """The settings of the anchors' group, as they cross."""
        settings = {**self.defaults, **self.param_groups[0]}
        return {name: _plain(settings[name]) for name in OPTIMIZER_OPTIONS[self._kind]}

    def _require_groups(self) -> None:
        """Refuse groups that were edited by hand, and settings of the first one that only the enclave's could heed."""
        first = self.param_groups[0]
        here = [[id(p) for p in self._of_enclave(group)] for group in self.param_groups]
        local = [[id(p) for p in group["params"]] for group in self._local.param_groups]
        if here != local or not self._anchors <= {id(parameter) for parameter in first["params"]}:
            raise UsageError(
                "the groups of an optimizer with LoRA that the worker trains were edited",
                expected="those of create_optimizer, and what add_param_group added",
                hint="freeze what is not to be trained, and call create_optimizer again",
            )
        for name, value in self._others.items():
            if first.get(name, value) != value:
                raise UsageError(
                    "option of an optimizer on the worker",
                    got=name,
                    expected=f"some of {', '.join(sorted(OPTIMIZER_OPTIONS[self._kind]))}",
                    hint=_ANY,
                )

    def _scales(self) -> dict[str, float]:
        scales = {}
        for slot in self._adapter.slots:
            if (scale := slot.gradient.scale()) is None:
                continue
            if unfrozen := slot.gradient.factors - self._trained[slot]:
                raise UsageError(
                    "LoRA that the worker trains was unfrozen after its optimizer was made",
                    got=", ".join(f"lora_{name.upper()}" for name in sorted(unfrozen)),
                    where=slot.layer.path,
                    hint="freeze it again, or call create_optimizer again",
                )
            now = dict(zip("ab", slot.parameters()[1:], strict=True))
            if any(now[name] is not self._factors[slot][name] for name in slot.gradient.factors):
                raise UsageError(
                    "LoRA that the worker trains was replaced after its optimizer was made",
                    where=slot.layer.path,
                    hint="write values into the parameters that are there, or call create_optimizer again",
                )
            scales[slot.full_name] = scale
        return scales

    def state_dict(self) -> dict[str, Any]:
        """Return the schedule's state and, keyed, the factors and moments on the worker."""
        local = self._local.state_dict()
        return {**super().state_dict(), "worker": self._adapter.export(), "local": local, "keys": self._adapter.keys}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put both back: of the factors those that PEFT's parameters have, rounded, or after a failed step all.

        The others stay as they are, as those that a stock optimizer steps do when its state is loaded.

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
        if local is not None:
            self._local.load_state_dict(local)
        super().load_state_dict(state)
        header = {"action": "import", "kind": self._kind, "options": self._options()}
        if not (failed := self._adapter.stale):
            tensors = self._adapter.fitting(tensors)
        asked = []
        for session, slots in self._adapter.by_session().items():
            asked.append(session.submit("optimizer", "-", header, part_of(slots, tensors), {}))
        for pending in asked:
            pending.result()
        if failed:
            for slot in self._adapter.slots:
                slot.imported()
            self._adapter.fetch()


def _plain(value: Any) -> Any:
    """A setting as a message has it: a schedule may make a tensor of a rate."""
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return value.item() if isinstance(value, torch.Tensor) else value
