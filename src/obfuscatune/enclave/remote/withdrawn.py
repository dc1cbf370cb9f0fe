"""What is said where something that is on the worker, or folded into it, is asked for: a refusal that names it.

PEFT, ``torch.save`` and training code reach for weights, copies and dtypes of whatever module they meet. Each of these
would be wrong without a word, or fail in words that name neither the layer nor a way out.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from obfuscatune.errors import UnsupportedModelError

_WEIGHTS = ("weight", "in_features", "out_features")


class NotHereError(UnsupportedModelError, AttributeError):
    """The weight of a layer is asked for; an AttributeError too, because PEFT asks all layers whether they have it."""


class Fixed(nn.Module):
    """Base of what stands for keyed weights: its dtype and device are the worker's, and there is one of it only."""

    path = "-"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if (dtype := self._dtype()) is not None:
            refuse_conversion(fn, dtype, self.path)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _dtype(self) -> torch.dtype | None:
        """The dtype in which the worker has the weights; None where nothing here depends on it."""
        return None

    def _refuse_copy(self, *_: Any) -> NoReturn:
        raise refused_copy(self.path)

    __reduce__ = __reduce_ex__ = __copy__ = __deepcopy__ = _refuse_copy


class Standin(Fixed):
    """A module in the place of one whose code and numbers left: what is set on it, nobody would heed.

    ``scaling`` or ``act`` of an attention, ``eps`` of a norm: on the plain model's module each has its effect.
    """

    _is_sealed = False

    def seal(self) -> None:
        """From now on only what this module has itself can be set; names with an underscore are libraries' own."""
        self.__dict__["_is_sealed"] = True

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_sealed and not name.startswith("_") and not self._has(name):
            raise UnsupportedModelError(
                "a value is set on a module that the worker stands for, where it would have no effect",
                got=name,
                where=f"{self.path}.{name}",
                hint="set it, or in the configuration, before the model is protected; strict and paper keep the module",
            )
        super().__setattr__(name, value)

    def _has(self, name: str) -> bool:
        places = (self.__dict__, self._parameters, self._buffers, self._modules)
        return any(name in place for place in places) or hasattr(type(self), name)


class Departed(Standin, nn.ModuleDict):
    """Stands where attention or MLP was in a block that left as a whole; has PEFT's layers, and what is called not."""

    def __init__(self, path: str, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.path = path
        self.update(modules)

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: it is not here."""
        raise refused_piece(self.path)


def refused_piece(where: str) -> UnsupportedModelError:
    """Return what a call of a piece of the body by itself is refused with."""
    return UnsupportedModelError(
        "a piece of the model is called by itself, and all blocks are one call on the worker",
        where=where,
        hint="call the model, or protect with another profile: balanced has the blocks one by one",
    )


def refused_copy(where: str) -> UnsupportedModelError:
    """Return what a copy is refused with: ``copy``, ``pickle``, ``torch.save``, PEFT's ``modules_to_save``."""
    return UnsupportedModelError(
        "a protected model, or a part of it that is on the worker, can be neither copied nor pickled",
        where=where,
        hint="save_pretrained the adapter; a part of which PEFT trains a copy needs enclave_blocks or fold_norms=False",
    )


def refuse_conversion(fn: Callable[[Tensor], Tensor], dtype: torch.dtype, where: str) -> None:
    """Refuse what ``to``, ``half`` and their like do to a module, before anything is converted.

    Args:
        fn: what ``nn.Module._apply`` would do to each tensor. dtype: of the weights on the worker.

    Raises:
        UnsupportedModelError: it changes dtype or device.
    """
    after = fn(torch.empty(0, dtype=dtype))
    if after.dtype != dtype or after.device.type != "cpu":
        raise UnsupportedModelError(
            "a protected model keeps its dtype, and its device",
            got=f"{after.dtype} on {after.device.type}",
            expected=f"{dtype} on cpu",
            where=where,
            hint="convert the model before it is protected; torch.autocast may be used around it",
        )


class Withdrawn(Standin, nn.Linear):
    """Stands where a plain linear layer was that is on the worker now, keyed.

    It is an ``nn.Linear`` so that PEFT finds it where it looks for layers to adapt, and is told that it cannot: an
    adapter that comes later can be on the layers that had one when the model was protected.
    """

    def __init__(self, path: str) -> None:
        nn.Module.__init__(self)
        self.path = path

    def __getattr__(self, name: str) -> Any:
        if name in _WEIGHTS:
            raise self.refused(name)
        return super().__getattr__(name)

    def refused(self, name: str) -> NotHereError:
        """Return what asking for the weight, or its shape, is refused with."""
        return NotHereError(
            "the weight of this layer is on the worker, and what needs it cannot be done",
            got=name,
            where=self.path,
            hint="adapters on further layers, DoRA, PiSSA and their like: before protect; all layers that any "
            "adapter has need one by then. Models whose own code multiplies by it, as Mamba 2, Falcon-H1 and Bamba "
            'in training: profile="enclave"',
        )

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Refuse: the weight is not here."""
        raise NotHereError("this weight is on the worker", where=self.path, hint="call the model, not this layer")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.refuse_load(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def refuse_load(self, state_dict: Any, prefix: str) -> None:
        """Refuse values of the base layer, whose names start with ``prefix``: the worker would go on with its own."""
        if f"{prefix}weight" in state_dict or f"{prefix}bias" in state_dict:
            hint = "load base weights before the model is protected"
            raise NotHereError("a weight to be loaded is on the worker, keyed", where=self.path, hint=hint)

    def extra_repr(self) -> str:
        """Say what it is."""
        return "on the worker"
