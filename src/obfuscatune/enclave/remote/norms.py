"""A norm whose gain and bias are folded into the next remote layer, and which still gives what it gave.

The worker gets the normalized rows, the LoRA of plain PEFT sees the norm's own output: both are needed, and dividing
by a small gain to get from one to the other would lose precision. The rows are handed to whoever keys them by
:meth:`FoldedNorm.rows_of`.
"""

import threading
import weakref

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from obfuscatune.enclave.families import Norm
from obfuscatune.enclave.remote.calls import version_of
from obfuscatune.enclave.remote.withdrawn import Standin
from obfuscatune.errors import UnsupportedModelError
from obfuscatune.protocol.norms import rms_rows
from obfuscatune.protocol.threads import threads_for


class _Last(threading.local):
    """What a norm gave last to a thread: several may run the model at once."""

    rows: tuple[weakref.ref[Tensor], Tensor, int | Tensor] | None = None


class FoldedNorm(Standin):
    """``x = x^ * gain + bias``: gives x, and hands over ``x^`` when asked for the rows of that very x.

    Keeps the parameters' names of the norm it replaces. They are frozen: their keyed copies are on the worker.
    """

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.path = norm.path
        self.weight = norm.module.weight
        if norm.shift is not None:
            self.bias = norm.module.bias
        self._kind, self._eps = norm.kind, norm.eps
        self._last = _Last()
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the norm's own output ``[..., d]``."""
        with threads_for(hidden_states.numel()):
            rows, output = self._rows_and_output(hidden_states)
        # An output that was made under `inference_mode` does not tell of changes in place.
        as_given = output.clone() if output.is_inference() else version_of(output)
        self._last.rows = weakref.ref(output), rows, as_given
        return output

    def _rows_and_output(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        if self._kind == "layernorm":
            rows = F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=self._eps)
            output = (
                rows * self.weight if "bias" not in self._parameters else torch.addcmul(self.bias, rows, self.weight)
            )
        elif self._kind == "rmsnorm":
            rows = rms_rows(hidden_states, self._eps)
            output = self.weight * rows
        else:
            rows = rms_rows(hidden_states, self._eps)
            wide = torch.promote_types(rows.dtype, torch.float32)  # in bfloat16 1 + w has few bits
            output = (rows.to(wide) * (1 + self.weight.to(wide))).to(rows.dtype)
        return rows, output

    def rows_of(self, output: Tensor, layer: str) -> Tensor:
        """Return the normalized rows that ``output`` came from, and forget them.

        Raises:
            UnsupportedModelError: ``output`` is not what this norm gave last: something stands between the two, or has
            changed it in place.
        """
        last, self._last.rows = self._last.rows, None
        if last is None or last[0]() is not output or not _is_as_given(output, last[2]):
            raise UnsupportedModelError(
                "input of a remote layer did not come from its norm",
                where=layer,
                hint="something wraps the layer; fold_norms=False does without the norm's normalized rows",
            )
        return last[1]


def _is_as_given(output: Tensor, as_given: int | Tensor) -> bool:
    if isinstance(as_given, int):
        return version_of(output) == as_given
    return torch.equal(output, as_given) or bool(as_given.isnan().any())  # which is equal to nothing, and told later
