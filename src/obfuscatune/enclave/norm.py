"""A LayerNorm whose gain and bias are folded into the next remote layer, and which still gives what it gave.

The worker gets the normalized rows, the LoRA of plain PEFT sees the norm's own output: both are needed, and dividing
by a small gain to get from one to the other would lose precision.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from obfuscatune.errors import UnsupportedModelError


class FoldedLayerNorm(nn.Module):
    """``x = x^ * gain + bias``; the normalized rows ``x^`` ride along as the attribute ``normalized`` of the output.

    Keeps the parameters' names of the ``nn.LayerNorm`` it replaces. They are frozen: their keyed copies are on the
    worker.
    """

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.shape = tuple(norm.normalized_shape)
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the norm's own output, its normalized rows attached."""
        normalized = F.layer_norm(hidden_states, self.shape, eps=self.eps)
        output = torch.addcmul(self.bias, normalized, self.weight)
        output.normalized = normalized  # type: ignore[attr-defined]
        return output


def normalized_rows(x: Tensor, *, folded: bool, layer: str) -> Tensor:
    """Return what a remote layer keys: ``x`` itself, or where norms are folded the normalized rows it came from."""
    if not folded:
        return x
    try:
        return x.normalized  # type: ignore[attr-defined, no-any-return]
    except AttributeError:
        raise UnsupportedModelError(
            "input of a remote layer did not come from its norm",
            where=layer,
            hint="something wraps the layer; fold_norms=False does without the norm's normalized rows",
        ) from None
