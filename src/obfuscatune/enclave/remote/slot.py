"""A LoRA slot: where a low-rank product is added on the worker, and what of PEFT's layer must be as it was made."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from obfuscatune.enclave.families import Layer
from obfuscatune.enclave.families.form import refuse_variants
from obfuscatune.enclave.hooks import own_code
from obfuscatune.enclave.remote.calls import RemoteCall, version_of
from obfuscatune.errors import UnsupportedModelError

# Of PEFT's layer, what it calls in its forward.
_CALLED = ("base_layer", "lora_A", "lora_B")
_CALLED_WITH_DROPOUT = (*_CALLED, "lora_dropout")
_OWN_CODE = "attention='enclave', mlp='enclave' and lora_placement='enclave' together run PEFT's own code"


@dataclass(frozen=True, slots=True, eq=False, repr=False)  # a repr would show factors
class State:
    """What a slot adds to a product, as far as it can be told without reading values.

    Attributes:
        values: of each adapter in use its name, scale, dropout, and the versions of its factors. factors: themselves,
            and not their ids, which others have once they are gone.
    """

    values: list[tuple[Any, ...]]
    factors: list[Tensor]

    def is_as(self, other: "State") -> bool:
        """Whether both are of the same factors, unchanged, used in the same way."""
        same = self.values == other.values and len(self.factors) == len(other.factors)
        return same and all(a is b for a, b in zip(self.factors, other.factors, strict=True))


class Slot(ABC):
    """A place in a segment where a low-rank product is added.

    Attributes:
        holder: the module in which PEFT's layer stands; one that was unloaded adds nothing.
        called: whether PEFT's layer is called here, and not only read.
        calls_dropout: whether its dropout is.
    """

    called = False
    calls_dropout = False

    def __init__(self, name: str, layer: Layer) -> None:
        # Without the plain weight, which would be in memory as long as the model, and was sent away.
        self.name, self.layer = name, replace(layer, base=None)
        self.lora: Any = layer.lora
        self.holder: nn.Module = layer.parent
        # Those of an adapter that is there by now are switched off with a warning where they are not called.
        self._dropouts = {name: getattr(module, "p", 0.0) for name, module in layer.lora.lora_dropout.items()}

    @abstractmethod
    def contribute(self, call: RemoteCall, x: Tensor | None) -> None:
        """Add to ``call`` what this slot sends. x: the layer's plain input ``[..., in]``, where the enclave has it."""

    def in_use(self) -> list[str]:
        """Names of the adapters that are in use; none where PEFT's layer is not in the model any more."""
        there: Any = self.holder._modules.get(self.layer.name)
        if there is not self.lora or there.disable_adapters:
            return []
        names: list[str] = there.active_adapters
        return names

    def state(self) -> State:
        """Return what it would add now."""
        state = State([], [])
        for name in self.in_use():
            if name not in self.lora.lora_A:
                continue
            factors = [self.lora.lora_A[name].weight, self.lora.lora_B[name].weight]
            dropout = self.lora.lora_dropout[name]
            drawn = (dropout, dropout.training, getattr(dropout, "p", None))
            how = [(version_of(factor), factor.requires_grad) for factor in factors]
            state.values.append((name, self.lora.scaling[name], drawn, *how))
            state.factors.extend(factors)
        return state

    def active(self) -> str | None:
        """Name of the adapter in use, or None where adapters are disabled, or were unloaded.

        Raises:
            UnsupportedModelError: several at once, a merged one, another one for each row of a batch, one that is not
            plain LoRA, or code of the caller's in PEFT's layer.
        """
        self.refuse_hooks()
        names = self.in_use()
        if not names:
            return None
        if len(names) != 1 or self.lora.merged:
            raise UnsupportedModelError(
                "more than one active adapter, or a merged one", where=self.layer.path, hint="model.set_adapter(NAME)"
            )
        name = names[0]
        if name not in self.lora._modules["lora_A"]._modules:
            return None
        refuse_variants(self.lora, self.layer.path, [name])
        self.refuse_code_within(name)
        return name

    def refuse_hooks(self) -> None:
        """Refuse code on PEFT's layer where it would not run, and adapters by row, which PEFT tells it of by a hook."""
        if self.lora._forward_pre_hooks or (not self.called and own_code(self.lora) is not None):
            raise UnsupportedModelError(
                "adapter_names, another hook on a LoRA layer, or a forward of its own",
                where=self.layer.path,
                hint=_OWN_CODE,
            )

    def refuse_code_within(self, adapter: str) -> None:
        """Refuse what PEFT's layer would heed of the modules that it calls, and which are not called here.

        Hooks and forwards that are set on them, factors that are no plain linear layers, and a dropout that nobody was
        warned of.
        """
        modules = self.lora._modules  # at each call: not by nn.Module's lookup
        for name in _CALLED if self.calls_dropout else _CALLED_WITH_DROPOUT:
            part = modules[name] if name == "base_layer" else modules[name]._modules[adapter]
            if (own := own_code(part)) is not None:
                raise UnsupportedModelError(
                    f"{own} within a LoRA layer that is computed in part on the worker",
                    where=f"{self.layer.path}.{name}",
                    hint=_OWN_CODE,
                )
            if name in ("lora_A", "lora_B") and (
                part._parameters.get("bias") is not None or type(part).forward is not nn.Linear.forward
            ):
                raise UnsupportedModelError(
                    "a LoRA factor that is not a linear layer without bias",
                    got=type(part).__name__,
                    where=f"{self.layer.path}.{name}",
                    hint=_OWN_CODE,
                )
        if self.calls_dropout or not self.lora.training:
            return
        dropout = modules["lora_dropout"]._modules[adapter]
        if type(dropout) is not nn.Identity and getattr(dropout, "p", 1.0) not in (0.0, self._dropouts.get(adapter)):
            raise UnsupportedModelError(
                "LoRA dropout of an adapter that came, or was changed, after the model was protected",
                got=getattr(dropout, "p", type(dropout).__name__),
                where=f"{self.layer.path}.lora_dropout",
                hint=f"lora_dropout=0, or model.eval(); {_OWN_CODE}, dropout too",
            )
