"""One pair of LoRA factors that the worker holds and trains (``lora_placement="worker"``, as the paper has it).

Stock training code wants parameters with gradients. Each such slot has an *anchor* in the enclave (`accumulated.py`): a
parameter whose gradient has the Euclidean norm of the gradient that the worker has accumulated for the slot. Under
orthogonal keys that norm equals the one in plain coordinates, so that ``clip_grad_norm_`` over the anchors computes the
true global norm and scales the anchors' gradients; `RemoteOptimizer` (`optimizer.py`) reads the factor off them.

PEFT's own parameters stay where they are and keep their ``requires_grad``: it says which factors the worker trains.
They never have a gradient here. After each step they have the worker's values: whoever reads them gets what is trained,
and a value that is not the one last exchanged was written by somebody since, and is sent before it is used or stepped.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from obfuscatune.enclave.families import Layer
from obfuscatune.enclave.families.form import refuse_variants
from obfuscatune.enclave.folding import key_rows, unkey_rows
from obfuscatune.enclave.keys import Key
from obfuscatune.enclave.remote.accumulated import Accumulated
from obfuscatune.enclave.remote.calls import RemoteCall, version_of
from obfuscatune.enclave.remote.passes import Passes
from obfuscatune.enclave.remote.slot import Slot
from obfuscatune.enclave.replies import not_finite
from obfuscatune.enclave.session import Session
from obfuscatune.enclave.shelf import Expected
from obfuscatune.errors import UsageError

_ROUNDING = 1e-13  # of un-keying in float64, relative to a factor's largest number


class HeldSlot(Slot):
    """One LoRA pair on the worker, and its twin in PEFT's layer, which has the same values after each step.

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
        self.pull_all: Callable[[], None] | None = None  # set by the adapter that it is part of
        self._adapter: str = self.lora.active_adapters[0]
        self._a, self._b = self.lora.lora_A[self._adapter].weight, self.lora.lora_B[self._adapter].weight
        self.gradient = Accumulated(layer.path)
        self.anchor = self.gradient.anchor
        self.session, self._passes, self._segment = session, passes, segment
        self._key_in, self._key_out = key_in, key_out
        self._moved: set[str] = set()  # the factors that the worker has changed since they were last exchanged
        self._compared = -1
        self._versions = (-1, -1)
        self._follows = True
        self._synced: tuple[Tensor, Tensor] | None = None
        self._scaling = math.nan
        self.push()

    def take_over(self) -> None:
        """Let the anchor require a gradient where a factor does."""
        self._follows = self._a.requires_grad or self._b.requires_grad
        self.anchor.requires_grad_(self._follows)

    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The anchor, and PEFT's parameters A and B."""
        self._look()
        return self.anchor, self._a, self._b

    def trained(self) -> tuple[str, ...]:
        """Names of the factors that require a gradient now, as training code has set it on PEFT's parameters.

        Raises:
            UsageError: training code has frozen the anchor and not them, or has put hooks on one of the three; or a
            tensor that requires a gradient is in the place of a factor (`torch.func.functional_call`).
        """
        anchor, *factors = self.parameters()
        names = tuple(name for name, p in zip("ab", factors, strict=True) if p.requires_grad)
        if names and any(p._backward_hooks or p._post_accumulate_grad_hooks for p in (anchor, *factors)):
            raise UsageError(
                "a hook on the gradient of LoRA that the worker trains, which has none here",
                where=self.layer.path,
                hint="clip_grad_norm_, or scale the loss; lora_placement='enclave' takes any hook",
            )
        if any(p.requires_grad and not isinstance(p, nn.Parameter) for p in factors):
            raise UsageError(
                "gradients of tensors in the place of LoRA's factors, which the worker trains",
                where=self.layer.path,
                hint="torch.no_grad(), or lora_placement='enclave'",
            )
        if names and not self.anchor.requires_grad:
            if self._follows:
                raise UsageError(
                    "LoRA that the worker trains is frozen by its anchor, and its factors are not",
                    got="requires_grad of the anchor alone was set to False",
                    where=self.layer.path,
                    hint="set requires_grad of the three alike: lora_A, lora_B and the anchor beside them",
                )
            self._follows = True
            self.anchor.requires_grad_(True)
        return names

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

    def _look(self) -> None:
        """Take the factors that PEFT's layer has now."""
        if self._adapter in self.lora.lora_A:  # or it was deleted
            self._a, self._b = self.lora.lora_A[self._adapter].weight, self.lora.lora_B[self._adapter].weight

    def scaling(self) -> float:
        """The factor on the product, as PEFT's layer has it now."""
        return float(self.lora.scaling[self._adapter])

    def lags(self) -> bool:
        """Whether the worker lacks values that were written to PEFT's layer."""
        self._look()
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

    def factors(self) -> Expected:
        """Name, shape and dtype of both factors on the worker."""
        pairs = {f"{self.full_name}.a": self._a, f"{self.full_name}.b": self._b}
        return {name: (tuple(parameter.T.shape), parameter.dtype) for name, parameter in pairs.items()}

    def pull(self, exported: dict[str, Tensor]) -> None:
        """Write the worker's keyed factors into PEFT's parameters, un-keyed, where it has changed them."""
        with torch.no_grad():  # a factor that nobody trained stays as it is, to the last bit
            for factor in self._moved:
                parameter = self._a if factor == "a" else self._b
                parameter.copy_(self._plain(factor, exported[f"{self.full_name}.{factor}"]))
        self._remember()

    def has(self, factor: str, keyed: Tensor) -> bool:
        """Whether PEFT's parameter is a keyed factor (``a`` or ``b``) un-keyed and rounded to its dtype."""
        now = (self._a if factor == "a" else self._b).detach()
        if keyed.shape != now.T.shape:
            return True  # which the worker refuses
        plain = self._plain(factor, keyed)
        size = now.double().abs()
        slack = torch.finfo(now.dtype).eps / 2 * size + _ROUNDING * size.max()
        return bool(((now - plain).abs() <= slack).all())

    def _plain(self, factor: str, keyed: Tensor) -> Tensor:
        """A keyed factor as PEFT has it, in float64."""
        if factor == "a":
            return key_rows(keyed.double(), self._key_in).T
        return self.layer.stored(self._key_out.apply_inverse(keyed.double())).T

    def _remember(self) -> None:
        self._moved = set()
        self._synced = (self._a.detach().clone(), self._b.detach().clone())
        self._versions = (version_of(self._a), version_of(self._b))

    def _is_untouched(self) -> bool:
        """Whether PEFT's layer has the tensors last exchanged, and none was changed in place.

        A decode step asks this. A write to ``.data`` does not show here: values are compared once in each pass.
        """
        modules, adapter = self.lora._modules, self._adapter
        a = modules["lora_A"]._modules[adapter]._parameters["weight"]
        b = modules["lora_B"]._modules[adapter]._parameters["weight"]
        return a is self._a and b is self._b and (version_of(a), version_of(b)) == self._versions

    def contribute(self, call: RemoteCall, x: Tensor | None) -> None:
        """Let the worker add its product; sends values that were loaded since.

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
        compared = self._compared == self._passes.number and self._is_untouched()
        if not compared or self.scaling() != self._scaling:
            if self.anchor.any():
                raise stock_optimizer(self.layer.path)
            if self.pull_all is not None:
                self.pull_all()
            self.push()
            self._compared, self._versions = self._passes.number, (version_of(self._a), version_of(self._b))
        call.held[self.name] = self
        if torch.is_grad_enabled() and (trained := self.trained()):
            call.trained[self.name] = trained

    def begin_backward(self) -> float | None:
        """Return what the worker multiplies this slot's gradient with before it adds to it; None to clear it."""
        return self.gradient.begin()

    def lose_gradient(self) -> None:
        """Note that the worker may have added to the gradient what nobody here has seen."""
        self.gradient.lose()

    def before_step(self) -> None:
        """Send what was written since the last pass, which a step is of, and note which factors it will change."""
        self.push()
        self._moved |= self.gradient.factors

    def stepped(self) -> None:
        """Note that the worker was asked to step the factors that had a gradient."""
        self.gradient.settle()

    def imported(self) -> None:
        """Note that the worker has other factors now."""
        self._moved = {"a", "b"}

    def take_norm(self, norm: Any, factors: tuple[str, ...]) -> Tensor:
        """Return the increment of the accumulated gradient, as the anchor's gradient. Refuses what is no norm.

        Args:
            norm: as the worker tells it, None where it is not finite.
        """
        if norm is None:
            raise not_finite(self.layer.path, "gradients of LoRA", "on the worker")
        if not isinstance(norm, float | int) or not math.isfinite(norm) or norm < 0:
            raise self.session.fault("gradient norm of a held slot", self.layer.path)
        return self.gradient.add(float(norm), factors)


def stock_optimizer(where: str) -> UsageError:
    """Return what an optimizer of the enclave's is refused with."""
    return UsageError(
        "an optimizer of the enclave was to step a LoRA pair that the worker trains",
        where=where,
        hint="pass protected.create_optimizer(...) to the Trainer: optimizers=(optimizer, None)",
    )
