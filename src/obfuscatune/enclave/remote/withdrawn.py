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


class Withdrawn(Fixed, nn.Linear):
    """Stands where a plain linear layer was that is on the worker now, keyed.

    It is an ``nn.Linear`` so that PEFT finds it where it looks for layers to adapt, and is told that it cannot: an
    adapter that comes later can be on the layers that had one when the model was protected.
    """

    def __init__(self, path: str) -> None:
        nn.Module.__init__(self)
        self.path = path

    def __getattr__(self, name: str) -> Any:
        if name in _WEIGHTS:
            raise NotHereError(
                "the weight of this layer is on the worker, and what needs it cannot be done",
                got=name,
                where=self.path,
                hint="adapters on further layers, DoRA, PiSSA and their like: before protect; all layers that any "
                "adapter has need one by then",
            )
        return super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Refuse: the weight is not here."""
        raise NotHereError("this weight is on the worker", where=self.path)

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
