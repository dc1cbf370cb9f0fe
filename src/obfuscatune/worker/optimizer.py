"""The optimizer of LoRA factors that the worker holds; the enclave steps it with rate, decay and clipping."""

from typing import Any

import torch
from torch import Tensor

from obfuscatune.errors import ProtocolError
from obfuscatune.protocol.optimizers import OPTIMIZER_OPTIONS
from obfuscatune.worker.adapters import HeldFactors

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
# What belongs to the update rule. The rest of torch's options choose kernels (`capturable` asserts on a CPU tensor).


class HeldOptimizer:
    """A stock torch optimizer over all held factors, made at the first step.

    AdamW divides by a per-coordinate second moment, and keyed coordinates are mixtures of the plain ones: its curve is
    another one than in plain coordinates. SGD's is the same, under orthogonal keys.
    """

    def __init__(self) -> None:
        self._held: dict[str, HeldFactors] = {}
        self._optimizer: torch.optim.Optimizer | None = None

    def add(self, name: str, factors: HeldFactors) -> None:
        """Take the factors of one slot into the optimizer's care."""
        self._held[name] = factors

    def state(self) -> list[Tensor]:
        """Return the gradients and the optimizer's state of all factors."""
        grads = [p.grad for _, p in self._parameters() if p.grad is not None]
        moments = [] if self._optimizer is None else self._optimizer.state.values()
        return [*grads, *(value for state in moments for value in state.values() if isinstance(value, Tensor))]

    def handle(self, header: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Run one action: ``step``, ``export`` or ``import``."""
        action = header.get("action")
        if action == "step":
            return {}, self._step(header)
        if action == "export":
            return {}, self._export()
        if action == "import":
            self._import(header, tensors)
            return {}, {}
        raise ProtocolError("optimizer action", got=repr(action)[:40], expected="step, export or import")

    def _parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(f"{name}.{factor}", p) for name, held in self._held.items() for factor, p in held.parameters().items()]

    def _make(self, kind: Any, options: Any) -> torch.optim.Optimizer:
        return _optimizer([p for _, p in self._parameters()], kind, options)

    def _step(self, header: dict[str, Any]) -> dict[str, Tensor]:
        """Step the slots that have a factor for their gradient; returns what has become of them."""
        kind, options = header.get("kind"), header.get("options")
        if self._optimizer is None:
            self._optimizer = self._make(kind, options)
        # Of each step: a schedule may change any of them.
        made = _optimizer([torch.nn.Parameter(torch.zeros(1))], kind, options).param_groups[0]
        settings = {name: made[name] for name in OPTIMIZER_OPTIONS[str(kind)] & set(options or ()) if name != "lr"}
        self._optimizer.param_groups[0].update({**settings, "lr": float(header["lr"])})
        # Gradient clipping, decided in the enclave; a slot without a factor is not stepped.
        scales = header.get("scales", {})
        for name, held in self._held.items():
            if name in scales:
                held.scale_gradient(scales[name])
            else:
                held.clear()
        self._optimizer.step()
        return {name: p.detach() for name, p in self._parameters() if name.rpartition(".")[0] in scales}

    def _export(self) -> dict[str, Tensor]:
        out = {name: parameter.detach() for name, parameter in self._parameters()}
        if self._optimizer is not None:
            for name, parameter in self._parameters():
                for key, value in self._optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor):
                        out[f"{name}/{key}"] = value
        return out

    def _import(self, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        parameters = dict(self._parameters())
        self._optimizer = self._make(header.get("kind"), header.get("options"))
        for name, tensor in tensors.items():
            target, _, key = name.partition("/")
            if target not in parameters:
                raise ProtocolError("state of a factor", got=target, expected="one that is held")
            if key == "step":  # torch counts on the CPU: on a GPU each step would wait for it
                self._optimizer.state[parameters[target]][key] = tensor.cpu()
            elif key:
                self._optimizer.state[parameters[target]][key] = tensor
            else:
                with torch.no_grad():
                    parameters[target].copy_(tensor)


def _optimizer(parameters: list[torch.nn.Parameter], kind: Any, options: Any) -> torch.optim.Optimizer:
    """Return a stock optimizer of these parameters, with options that were checked."""
    if kind not in OPTIMIZERS or not isinstance(options, dict):
        raise ProtocolError("optimizer", got=repr(kind)[:40], expected=", ".join(OPTIMIZERS))
    if not options.keys() <= OPTIMIZER_OPTIONS[kind]:
        raise ProtocolError("options of the optimizer", got=sorted(options), expected=sorted(OPTIMIZER_OPTIONS[kind]))
    try:
        return OPTIMIZERS[kind](parameters, **options)
    except (TypeError, ValueError) as error:
        raise ProtocolError("options of the optimizer", got=sorted(options), expected=str(error)) from error
