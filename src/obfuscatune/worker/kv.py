"""Keys and values of cached tokens, in buffers with room behind them, so that a step of decoding copies its own alone.

A :class:`Tokens` is a window on two buffers. To append writes behind the window where there is room, which leaves the
window itself as it was; two that both go on from one window write to the same place, so only one of them may be kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from obfuscatune.errors import ProtocolError

_LEAST_ROOM = 32  # tokens of room at least; otherwise as many again, so that copies cost a constant share


@dataclass(frozen=True, slots=True, repr=False)  # a repr would show activations
class Tokens:
    """Keys and values ``[B, G, length, n]`` of tokens.

    Attributes:
        buffers: of keys and of values, ``[B, G, room, n]``. start, length: which part of them the tokens are.
        owned: whether nobody else reads the buffers. A kept call's graph may: such ones are never written to.
    """

    buffers: tuple[Tensor, Tensor]
    start: int
    length: int
    owned: bool

    @classmethod
    def of(cls, k: Tensor, v: Tensor) -> "Tokens":
        """Keys and values as they are, without room and without a graph."""
        return cls((k.detach(), v.detach()), 0, k.shape[2], owned=False)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Return keys and values; views of the buffers."""
        k, v = self.buffers
        return k.narrow(2, self.start, self.length), v.narrow(2, self.start, self.length)

    def part(self, start: int, length: int, rows: Sequence[int] | None) -> "Tokens":
        """Return ``length`` of these tokens from ``start`` on, and of them the rows, in that order, where given."""
        part = Tokens(self.buffers, self.start + start, length, self.owned)
        if rows is None:
            return part
        index = torch.tensor(rows, dtype=torch.int64, device=self.buffers[0].device)
        return Tokens.of(*(tensor.index_select(0, index) for tensor in part.tensors()))

    def append(self, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, Tensor], "Tokens"]:
        """Return keys and values with those of new tokens behind them, and the window on them.

        Under autograd the tensors are new ones, with their graph.

        Raises:
            ProtocolError: the new tokens are of other rows or heads than these.
        """
        fits = [(*t.shape[:2], t.shape[3]) for t in (*self.buffers, k, v)]
        if len(set(fits)) != 1 or k.shape != v.shape:  # to copy would broadcast one row over many
            raise ProtocolError("rows, heads or width of cached tokens", got=list(fits[2]), expected=list(fits[0]))
        if torch.is_grad_enabled():
            mine = self.tensors()
            joined = torch.cat([mine[0], k], dim=2), torch.cat([mine[1], v], dim=2)
            return joined, Tokens.of(*joined)
        end = self.start + self.length + k.shape[2]
        grown = self if self.owned and end <= self.buffers[0].shape[2] else self._with_room(k.shape[2])
        behind = grown.start + grown.length
        for buffer, new in zip(grown.buffers, (k, v), strict=True):
            buffer.narrow(2, behind, new.shape[2]).copy_(new)
        longer = Tokens(grown.buffers, grown.start, grown.length + k.shape[2], owned=True)
        return longer.tensors(), longer

    def _with_room(self, new: int) -> "Tokens":
        """A copy of these tokens in buffers of their own, with room for the new ones and more."""
        length = self.length + new
        shape = list(self.buffers[0].shape)
        shape[2] = length + max(length, _LEAST_ROOM)
        mine = self.tensors()
        buffers = mine[0].new_empty(shape), mine[1].new_empty(shape)
        for buffer, old in zip(buffers, mine, strict=True):
            buffer.narrow(2, 0, self.length).copy_(old)
        return Tokens(buffers, 0, self.length, owned=True)
