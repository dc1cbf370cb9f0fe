"""What must not change after ``protect``, because the worker has a copy of it: looked for at each forward pass.

What the worker computes is fixed by the weights, folded norms and configuration that it was keyed from. Training code
may still change the enclave's copies of these; plain PyTorch would heed that, and the worker cannot.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from obfuscatune.enclave.families.options import refuse_options
from obfuscatune.enclave.families.stock import refuse_own_attention
from obfuscatune.enclave.guarded import refused_compilation
from obfuscatune.enclave.hooks import has_hooks_on_all
from obfuscatune.enclave.inputs import is_transformed
from obfuscatune.enclave.remote.calls import version_of
from obfuscatune.enclave.remote.linear import RemoteLinear
from obfuscatune.enclave.remote.norms import FoldedNorm
from obfuscatune.enclave.remote.passes import Passes
from obfuscatune.enclave.remote.whole import RemotePart
from obfuscatune.enclave.tuners import refuse_merging
from obfuscatune.errors import UnsupportedModelError
from obfuscatune.profiles import Profile


class _Watched:
    """A tensor of a module, as it was when the worker got what was made of it."""

    def __init__(self, module: nn.Module, name: str, path: str) -> None:
        self._module, self._name, self._path = module, name, f"{path}.{name}"
        self._place: dict[str, Any] = module._parameters if name in module._parameters else module.__dict__
        tensor: Tensor = getattr(module, name)
        self._tensor, self._version, self._value = tensor, version_of(tensor), tensor.detach().clone()

    def is_untouched(self) -> bool:
        """Whether it is the same tensor in the same version, and frozen. A decode step asks this of some dozens."""
        now = self._place.get(self._name)
        return now is self._tensor and not now.requires_grad and version_of(now) == self._version

    def require(self) -> None:
        """Refuse another tensor or value. A write to ``.data`` shows in values only."""
        now = getattr(self._module, self._name, None)
        if now is not None and now.requires_grad:
            raise self._changed("it is to be trained")
        if now is None or now.dtype != self._value.dtype or not torch.equal(now, self._value):
            raise self._changed("it was changed")
        self._tensor, self._version = now, version_of(now)

    def _changed(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"a norm or bias that is part of what the worker computes: {what}",
            where=self._path,
            hint="change it before the model is protected; fold_norms=False keeps norms in the enclave",
        )


class Guard:
    """A forward pre-hook of the model without its head. To be registered after all blocks were replaced.

    Raises:
        UnsupportedModelError: a folded norm or a bias was changed, attention is to look ahead, or an adapter was added
        that cannot be run exactly.
    """

    def __init__(self, causal_lm: Any, profile: Profile, passes: Passes) -> None:
        self._model, self._passes, self._on_worker = causal_lm, passes, profile.attention == "worker"
        self._watched = list(_watched(causal_lm))
        self._number = -1
        self._options: list[Any] = []

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Look at all of it; at values once in each pass, not at each token."""
        if torch.compiler.is_compiling():
            raise refused_compilation(self._model.path)
        if is_transformed():
            raise UnsupportedModelError(
                "a protected model within a transform of torch.func (grad, vmap, jvp)",
                where=self._model.path,
                hint="torch.autograd.grad, and batches in the place of vmap",
            )
        if forward_ad._current_level >= 0:  # what crosses has no tangent, and the result would lack it without a word
            raise UnsupportedModelError(
                "derivatives in forward mode (torch.autograd.forward_ad) of a protected model",
                where=self._model.path,
                hint="torch.autograd.grad",
            )
        if has_hooks_on_all():
            raise UnsupportedModelError(
                "hooks on all modules (register_module_forward_hook, FlopCounterMode): most are not called here",
                where=self._model.path,
                hint="register hooks on the modules that they are for; protected.report() has costs",
            )
        if self._on_worker:
            refuse_looking_ahead(self._model.config)
            refuse_own_attention(self._model.config)
        values, self._number = self._number != self._passes.number, self._passes.number
        for watched in self._watched:
            if values or not watched.is_untouched():
                watched.require()
        configurations = getattr(self._model, "peft_config", None) or {}
        now = list(configurations.values())
        if len(now) != len(self._options) or any(a is not b for a, b in zip(now, self._options, strict=True)):
            refuse_options(configurations, self._model)
            refuse_merging(self._model)  # of layers that have come
            self._options = now  # not their ids, which a later one may have too


def refuse_looking_ahead(config: Any) -> None:
    """Refuse a configuration whose attention sees later tokens where it runs on the worker."""
    if getattr(config, "is_causal", True) is False:
        raise UnsupportedModelError(
            "attention in both directions, which the worker does not compute",
            got="is_causal=False in the configuration",
            hint='protect with attention="enclave"',
        )


def _watched(model: nn.Module) -> Iterator[_Watched]:
    for path, module in model.named_modules():
        if isinstance(module, FoldedNorm):
            yield from (_Watched(module, name, path) for name, _ in module.named_parameters())
        folded = isinstance(module, RemoteLinear) and module.group.placed.norm is not None
        if (folded or isinstance(module, RemotePart)) and module.bias is not None:
            yield _Watched(module, "bias", path)
