"""Rows that attend to nothing, where all blocks are on the worker (`stream`): no loss may depend on them.

Softmax rows sum to one, so that a secret bias of v can be corrected by a constant (``folding.key_attention``). A row
that attends to nothing sums to zero. Elsewhere the enclave leaves the constant out of such rows. Here the worker adds
it, and to tell it what to leave out would tell it the bias. These rows are at left padding, where nobody looks, but for
one: the label of a row's first token is predicted from the last of them.
"""

import threading
from typing import Any

from torch import Tensor

from obfuscatune.errors import UnsupportedModelError

_IGNORED_LABEL = -100  # of transformers' losses


class _Last(threading.local):
    """Rows of a thread's last pass, bool ``[1 or B, T, 1]``."""

    rows: Tensor | None = None


class BlindRows:
    """Refuses a loss that depends on such rows. ``layer``: of the blocks, for messages."""

    def __init__(self, layer: str) -> None:
        self._layer, self._last = layer, _Last()

    def watch(self, output: Tensor, rows: Tensor | None) -> None:
        """Refuse a gradient at these rows of the blocks' output ``[B, T, d]``, and remember them; None for none."""
        self._last.rows = rows
        if rows is not None and output.requires_grad:
            output.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: self._require(not gradient.detach().masked_fill(~rows, 0).any())
            )

    def check_labels(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Refuse labels that were predicted from such rows: a forward hook of the model with its loss."""
        rows, labels = self._last.rows, kwargs.get("labels")
        if rows is not None and isinstance(labels, Tensor):
            self._require(not ((labels[:, 1:] != _IGNORED_LABEL) & rows[:, :-1, 0]).any())

    def _require(self, unused: bool) -> None:
        if not unused:
            raise UnsupportedModelError(
                "a loss of positions that attend to nothing, as padding on the left does",
                where=self._layer,
                hint=f"pad on the right, or give the first token of each row the label {_IGNORED_LABEL}",
            )
