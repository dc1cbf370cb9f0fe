"""What PEFT does to one layer after the other, and not to those whose weight left: refused before the first of them.

PEFT changes each layer as it comes to it, and layers that stay (embeddings, the first blocks under ``enclave_blocks``)
come before those that refuse. A merge would end with a part of the adapter merged, whose factors get no gradient any
more; a new adapter with some of its layers made, or, as PiSSA writes weights, with other weights in those that stay.
"""

from collections.abc import Iterator
from copy import copy
from functools import partial
from typing import Any, NoReturn

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from torch import nn

from obfuscatune.enclave.families.options import refuse_options, starts_from_weight
from obfuscatune.enclave.remote.withdrawn import Fixed, Withdrawn, refused_copy
from obfuscatune.errors import UnsupportedModelError


class GuardedTuner(Fixed):
    """Comes before the class of PEFT's tuner, as `Guarded` before that of the model."""

    def merge_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Merge, as ever, where no layer of the adapter has left."""
        self._require_weights()
        return super().merge_adapter(*args, **kwargs)  # type: ignore[misc]

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> Any:
        """The same; ``unload`` needs no weight."""
        self._require_weights()
        return super().merge_and_unload(*args, **kwargs)  # type: ignore[misc]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Add an adapter, as ever, if every layer that it names can have it."""
        _refuse_new(self, model, adapter_name)
        return super().inject_adapter(model, adapter_name, *args, **kwargs)  # type: ignore[misc]

    def _require_weights(self) -> None:
        if (path := _first_gone(self.model)) is not None:  # type: ignore[arg-type]
            _refuse_merge(path)


def guard_tuners(model: nn.Module) -> None:
    """Guard PEFT's tuners in a model, whose layers were replaced, and its layers."""
    for module in model.modules():
        if isinstance(module, BaseTuner):
            kind = type(module)
            body = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
            body["path"] = kind.__name__
            module.__class__ = type(kind.__name__, (GuardedTuner, kind), body)
    refuse_merging(model)


def refuse_merging(model: nn.Module) -> None:
    """Let every layer of PEFT's refuse to merge where some have left: for code that has another tuner, or none."""
    if (first := _first_gone(model)) is None:
        return
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            layer: Any = module
            base = layer.get_base_layer()
            layer.merge = partial(_refuse_merge, base.path if isinstance(base, Withdrawn) else first)


def _refuse_new(tuner: Any, model: nn.Module, name: str) -> None:
    """Refuse a new adapter that needs a weight which left, or a copy of a module of which a part has.

    Raises:
        UnsupportedModelError: what PEFT would meet half-way, and options that no call would run with.
    """
    config: Any = copy(tuner.peft_config[name])  # PEFT completes it in place
    if not isinstance(config, LoraConfig):
        return
    refuse_options({name: config}, model)
    config = _maybe_include_all_linear_layers(
        tuner._prepare_adapter_config(config, tuner.get_model_config(model)), model
    )
    for path, layer, has_slot in _gone(model):
        if (not has_slot or starts_from_weight(config)) and tuner._check_target_module_exists(config, path):
            raise layer.refused("weight")
    for path, module in model.named_modules():
        if any(path.endswith(end) for end in config.modules_to_save or ()):
            for part in module.modules():
                if isinstance(part, Fixed):
                    raise refused_copy(part.path)


def _gone(model: nn.Module) -> Iterator[tuple[str, Withdrawn, bool]]:
    """Path of each layer that left, as PEFT sees it, what stands there, and whether a layer of PEFT's is around it."""
    for path, module in model.named_modules():
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(base, Withdrawn) and not path.endswith(".base_layer"):
            yield path, base, base is not module


def _first_gone(model: nn.Module) -> str | None:
    """Where the first layer is that has an adapter and no weight; None where there is none."""
    return next((base.path for _, base, adapted in _gone(model) if adapted), None)


def _refuse_merge(path: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise UnsupportedModelError(
        "the adapter cannot be merged: the weight is on the worker",
        where=path,
        hint="save_pretrained the adapter, and merge it into the original model",
    )
