"""The whole decoder body on the worker, in one call: the rotated residual stream (`stream`).

What enters and leaves is the residual stream under one secret rotation, ``x* = x R``; where norms are LayerNorms it is
centred first, ``x* = x C R`` with ``C = I - 11^T/d``. The mean of a row that C takes away is not seen by any LayerNorm,
and neither by the final one, in the enclave; so all that is computed after it is that of the plain model.
"""

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from obfuscatune.enclave.folding import centre
from obfuscatune.enclave.keys import decode, encode
from obfuscatune.enclave.remote.blind import BlindRows
from obfuscatune.enclave.remote.cache import CacheMirror, take_cache
from obfuscatune.enclave.remote.calls import RemoteCall, without_autocast
from obfuscatune.enclave.remote.linear import Placed
from obfuscatune.enclave.remote.passes import Passes
from obfuscatune.enclave.remote.slot import Slot
from obfuscatune.enclave.remote.standing import Standing
from obfuscatune.enclave.remote.whole import add_cache, refuse_unknown
from obfuscatune.enclave.remote.withdrawn import Departed, Standin, refused_piece
from obfuscatune.errors import UnsupportedModelError


class Remaining(threading.local):
    """How many of the later blocks a thread's pass has yet to come to, once the body has done the work of all."""

    count = 0


class RemoteBody(Standin):
    """Stands in the place of the first block that is on the worker, and does the work of all of them.

    Sends ``x R``, or ``x C R``, and returns ``y R^-1``.

    Args:
        placed: its two keys are R, orthogonal. centred: whether C is there; rows that come back are centred then.
        index: of the block, which is also the layer of the enclave's cache that mirrors all of the worker's.
        passed: indices of the other blocks. remaining: how many of them are still to be called, which they count.
        slots: LoRA of all blocks. offset: whether the worker adds something for a secret bias of v.

    Attributes:
        gradient_checkpointing: set by ``transformers``, as on its own blocks; the worker recomputes then.
    """

    gradient_checkpointing = False

    def __init__(
        self,
        placed: Placed,
        *,
        centred: bool,
        mirror: CacheMirror,
        passes: Passes,
        index: int,
        passed: Sequence[int],
        remaining: Remaining,
        slots: Sequence[Slot],
        offset: bool,
    ) -> None:
        super().__init__()
        self.placed, self.path, self._centred, self._slots = placed, placed.path, centred, slots
        self.blind = BlindRows(placed.path) if offset else None
        self._mirror, self._passes, self._index = mirror, passes, index
        self._passed, self._remaining = passed, remaining
        self._standing: Standing | None = None

    def watch(self, standing: Standing) -> None:
        """Heed from now on what is done to the blocks, which are in their places."""
        self._standing = standing

    def require_all(self, *_: Any) -> None:
        """Refuse a pass that left blocks out, as ``num_hidden_layers`` says: a forward hook of the model."""
        count, self._remaining.count = self._remaining.count, 0
        if count:
            raise UnsupportedModelError(
                "the model skips some blocks, but the worker computes all of them in one call",
                got=f"{len(self._passed) - count} called after the first",
                expected=str(len(self._passed)),
                where=self.path,
                hint="take blocks out of the list, and set num_hidden_layers, before the model is protected",
            )

    def _dtype(self) -> torch.dtype:
        return self.placed.dtype

    def forward(
        self,
        hidden_states: Tensor,
        by_position: Any = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return ``[B, T, d]``. The order of arguments is that of GPT-2's blocks, the only ones called by position.

        Args:
            by_position: the cache, which other blocks are given by name.

        Raises:
            UnsupportedModelError: an argument that is not understood, a mask with values other than allowed and
            forbidden, an unknown kind of cache, or gradients through a cache filled by an earlier call.
        """
        cache = take_cache(kwargs) if by_position is None else by_position
        refuse_unknown({"encoder_hidden_states": encoder_hidden_states, **kwargs}, self.placed.path)
        with without_autocast():
            return self._run(hidden_states, attention_mask, position_embeddings, cache)

    def _run(
        self, hidden_states: Tensor, mask: Tensor | None, tables: tuple[Tensor, Tensor] | None, cache: Any
    ) -> Tensor:
        if self._standing is not None:
            self._standing.require()
        placed = self.placed
        if not self._passes.enter_body():
            raise refused_piece(placed.path)
        rows = placed.rows(hidden_states)
        rows = centre(rows) if self._centred else rows
        call = RemoteCall(
            placed.session,
            placed.segment,
            placed.path,
            tensors={"x": encode(rows, placed.key_in)},
            shapes={"y": tuple(hidden_states.shape)},
            header={"recompute": self.gradient_checkpointing and self.training},
        )
        for slot in self._slots:
            slot.contribute(call, None)
        self._passes.add_mask(call, mask)
        self._passes.add_rotary(call, tables)
        if call.looked_at and self.blind is not None:
            raise UnsupportedModelError(
                "a position that attends to nothing, and that others attend to",
                where=placed.path,
                hint="let each position attend to itself, or rotate_stream=False",
            )
        if cache is not None:
            add_cache(call, self._mirror, cache, self._index, self._passed)
        y = decode(call.run()["y"], placed.key_out)
        if self.blind is not None:
            self.blind.watch(y, call.blind)
        self._remaining.count = len(self._passed)
        return self._passes.leave_body(y)


class PassedBlock(Standin):
    """Stands in the place of every later block of the body: gives what it gets, which must be what the body gave."""

    def __init__(self, path: str, passes: Passes, remaining: Remaining) -> None:
        super().__init__()
        self.path, self._passes, self._remaining = path, passes, remaining

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return ``hidden_states``; raises UnsupportedModelError where the body has not given it."""
        if not self._passes.is_of_body(hidden_states):
            raise refused_piece(self.path)
        self._remaining.count -= 1
        return hidden_states


def adopt(shell: nn.Module, block: nn.Module, path: str, parts: dict[str, dict[str, nn.Module]]) -> nn.Module:
    """Give ``shell`` the children of ``block``, so that parameters keep their names, and return it.

    Args:
        path: of the block. parts: by name of a child that has left, what stays of its own children: PEFT's layers, and
            dropouts.
    """
    for name, child in block.named_children():
        shell.add_module(name, Departed(f"{path}.{name}", parts[name]) if name in parts else child)
    return shell
