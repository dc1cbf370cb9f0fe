"""What is refused by name where torch's own error would tell neither what is wrong nor a way out."""

from typing import Any

import torch
from torch import Tensor, nn

from obfuscatune.errors import UnsupportedModelError

_HALVES = {torch.bfloat16, torch.float16}


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` (grad, vmap, jvp) runs: no number can be read then."""
    return torch._C._are_functorch_transforms_active()


class Inputs:
    """A forward pre-hook of the model without its head, under every profile: what would end in torch's own error.

    Raises:
        UnsupportedModelError: the pass has a token that the embedding does not have, or is under ``torch.autocast`` to
        the other half-width dtype than the weights have, whose mixtures torch's operations refuse.
    """

    def __init__(self, causal_lm: Any) -> None:
        self._model, self._dtype = causal_lm, causal_lm.dtype

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at the arguments, and at the context."""
        if torch.compiler.is_compiling():  # of a profile that sends nothing away
            return
        if torch.is_autocast_enabled("cpu") and {self._dtype, torch.get_autocast_dtype("cpu")} == _HALVES:
            raise UnsupportedModelError(
                "torch.autocast to another half-width dtype than the weights have",
                got=str(torch.get_autocast_dtype("cpu")),
                expected=str(self._dtype),
                hint="leave autocast out (Trainer: fp16=False), or load the model in float32",
            )
        tokens, weight = kwargs.get("input_ids", args[0] if args else None), self._embedding()
        if not isinstance(tokens, Tensor) or weight is None or not tokens.numel() or is_transformed():
            return
        least, largest = (int(end) for end in torch.aminmax(tokens))
        if least < 0 or largest >= len(weight):
            raise UnsupportedModelError(
                "a token that the model has no embedding of",
                got=least if least < 0 else largest,
                expected=f"0 to {len(weight) - 1}",
                hint="tokenizers have special tokens for pictures and sounds; leave them out",
            )

    def _embedding(self) -> Tensor | None:
        weight: Tensor | None = getattr(self._model.get_input_embeddings(), "weight", None)
        return weight
