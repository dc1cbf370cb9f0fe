"""Which tensor enters which linear layer of a model: found by one run on the meta device, with the layers away."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from obfuscatune.enclave.families.empty import empty_model
from obfuscatune.enclave.remote.withdrawn import NotHereError, Withdrawn
from obfuscatune.errors import ONLY_INSIDE, UnsupportedModelError

_CROSS = ("cross", "encoder_")  # names of attention to what an encoder gives
_TOKENS = 4  # of the run without data; a number that no layer's width is likely to be mistaken for


class _Away(Withdrawn):
    """A layer of the model without data, as it will be: away, so that the model's own code meets no weight.

    Attributes:
        entered: what it was called with, kept, so that no two have one address.
    """

    def __init__(self, path: str, plain: nn.Module) -> None:
        super().__init__(path)
        self.entered: list[Tensor] = []
        self.bias: Any = plain.bias  # which stays
        self._width: Any = plain.nf if isinstance(plain, Conv1D) else plain.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the form of the layer's result."""
        self.entered.append(x)
        return x.new_empty(*x.shape[:-1], self._width)


def trace(model: Any, paths: list[str], where: str) -> dict[str, int]:
    """Return, by path of a layer, a number for the tensor that entered it.

    Raises:
        UnsupportedModelError: a model that cannot be run without data, a layer that is not called just once or whose
        weight other code takes, or one that was added to the model.
    """
    # Eager attention, because the making of masks for others looks at values, and there are none.
    kind = type(model) if type(model).__module__.startswith("transformers.models.") else None
    skeleton = empty_model(model.config, kind, attn_implementation="eager")
    there = {name for name, _ in skeleton.named_modules()}
    for path in paths:
        if path not in there:
            raise UnsupportedModelError(
                "a linear layer that the configuration's architecture does not have",
                expected=f"the layers of {type(skeleton).__name__}",
                where=path,
                hint=ONLY_INSIDE,
            )
    layers: dict[str, _Away] = {}
    for path in paths:
        parent, _, name = path.rpartition(".")
        layers[path] = _Away(path, skeleton.get_submodule(path))
        setattr(skeleton.get_submodule(parent), name, layers[path])
    ids = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
    made = torch.zeros(1, 1, _TOKENS, _TOKENS, dtype=next(skeleton.parameters()).dtype, device="meta")
    failure: Exception | None = None
    flat = torch.ones(1, _TOKENS, device="meta")
    # One that is made already, or one that the model makes for itself, or of a tokenizer.
    for mask in (made, None, flat):
        for layer in layers.values():
            layer.entered.clear()
        try:
            with torch.no_grad():
                skeleton(input_ids=ids, attention_mask=mask, use_cache=False)
            break
        except NotHereError as error:
            raise UnsupportedModelError(
                "the model's own code takes the weight of a layer, which would be on the worker",
                got=error.got,
                where=error.where,
                hint=ONLY_INSIDE,
            ) from error
        except Exception as error:  # whatever the model's own code does with tensors that have no data
            failure = error
    else:
        raise _not_run(failure, where) from failure
    for path, layer in layers.items():
        if len(layer.entered) != 1:
            crossed = any(part.startswith(_CROSS) for part in path.split("."))
            why = "cross-attention is not called without what an encoder gives; " if crossed else ""
            raise UnsupportedModelError(
                "a linear layer that is not called once",
                got=f"{len(layer.entered)} calls in a forward",
                expected="1",
                where=path,
                hint=why + ONLY_INSIDE,
            )
    return {path: id(layer.entered[0]) for path, layer in layers.items()}


def _not_run(failure: Exception | None, where: str) -> UnsupportedModelError:
    """Return what a model is refused with whose code failed on tensors without data."""
    said = str(failure).split("\n", 1)[0]
    if isinstance(failure, NotImplementedError) or "meta tensor" in said:
        what, got = "the model's own code looks at values of tensors, so its layers cannot be found without data", None
    else:
        what, got = "the model's layers cannot be found by running it", f"{type(failure).__name__}: {said[:120]}"
    return UnsupportedModelError(what, got=got, where=where, hint=ONLY_INSIDE)
