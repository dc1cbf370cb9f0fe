"""The class of a protected model: its own, but for what would be wrong with weights that are not here.

The class is made of the model's, under the same name, so that it still is one, in `isinstance` and by its name.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from obfuscatune.enclave.remote.body import RemoteBody
from obfuscatune.enclave.remote.passes import Passes, one_generation
from obfuscatune.enclave.remote.whole import RemoteAttention
from obfuscatune.enclave.remote.withdrawn import Fixed, Withdrawn
from obfuscatune.errors import UnsupportedModelError


def guard_class(model: Any, passes: Sequence[Passes]) -> None:
    """Give a causal language model of ``transformers``, whose layers were replaced, the guarded form of its class.

    Args:
        passes: of its workers.
    """
    kind = type(model)
    body = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    model.path, model.passes = kind.__name__, list(passes)
    model.__class__ = type(kind.__name__, (Guarded, kind), body)
    if (inner := model.base_model) is not model and hasattr(inner, "set_attn_implementation"):
        outer: Any = weakref.ref(model)  # which must go with its last reference, as it ends the sessions then
        inner.set_attn_implementation = lambda *args, **kwargs: outer().set_attn_implementation(*args, **kwargs)


class Guarded(Fixed):
    """Comes before the model's own class."""

    passes: list[Passes]

    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.dtype  # type: ignore[assignment]
        return dtype

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save an adapter that ``transformers`` holds; refuse to save a model of which most is not here."""
        if getattr(self, "_hf_peft_config_loaded", False):
            return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]
        raise UnsupportedModelError(
            "a protected model cannot be saved: its large weights are on the worker, keyed",
            where=self.path,
            hint="a PEFT model's save_pretrained saves the adapter; state_dict() has what stayed in the enclave",
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate, as ever; what the worker has a copy of is compared by value once, at the first step."""
        config: Any = self.config
        blocks = getattr(config, "num_hidden_layers", None)
        try:
            with one_generation():
                return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            if blocks is not None and config.num_hidden_layers != blocks:
                # `assistant_early_exit` lowers it, and a refusal leaves it so: later calls would skip blocks.
                config.num_hidden_layers = blocks

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Set it, as ever, and let the workers attend as that kind does where a row sees nothing."""
        super().set_attn_implementation(*args, **kwargs)  # type: ignore[misc]
        config: Any = self.config
        for passes in self.passes:
            passes.eager = config._attn_implementation == "eager"

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse at once what transformers would refuse request by request, each with an empty answer."""
        if any(isinstance(module, RemoteAttention | RemoteBody) for module in self.modules()):
            raise UnsupportedModelError(
                "continuous batching (generate_batch) where attention and its cache are on the worker",
                where=self.path,
                hint='generate with rows padded on the left, obfuscatune serve, or protect with attention="enclave"',
            )
        return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for path, module in self.named_modules():  # here, before anything is loaded
            if isinstance(module, Withdrawn):
                module.refuse_load(state_dict, f"{prefix}{path}.")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def init_weights(self) -> None:
        """Refuse: the worker would go on with the old ones."""
        raise UnsupportedModelError(
            "a protected model cannot be given new weights: most of them are on the worker, keyed",
            where=self.path,
            hint="initialize the model before it is protected",
        )

    initialize_weights = init_weights

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: most of the model is not here to be compiled."""
        raise refused_compilation(self.path)


def refused_compilation(where: str) -> UnsupportedModelError:
    """Return what ``torch.compile`` is refused with."""
    return UnsupportedModelError(
        "a protected model cannot be compiled: most of it runs on the worker",
        where=where,
        hint="leave torch.compile out; generate(disable_compile=True) where a cache asks for it",
    )
