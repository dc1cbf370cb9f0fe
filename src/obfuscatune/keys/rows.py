r"""Row mixing: a secret orthogonal A over the rows of one call, used once (profile `strict`).

    A = P4 B4 P3 B3 P2 B2 P1 B1 P0,   A^-1 = A^T,

rounds of blocks between secret permutations, as a Monarch key has them, but over tokens instead of features. All
permutations are fresh in every call. A block is ``diag(s) Q diag(s')`` with fresh signs s, s' and Q drawn afresh from a
pool of Haar matrices that is secret, and made once for a session: a fresh Haar matrix of 64 takes longer to make than
to use. So A is not a Haar matrix, for which alone what mixing hides can be proved; ``docs/design.md`` says what that
leaves open.
"""

import torch
from torch import Tensor

from obfuscatune.keys.orthogonal import haar_blocks
from obfuscatune.keys.source import Secret, Stream

BLOCK = 64
LARGE_BLOCK = 128  # above 2048 rows: with b^2 < m many pairs of rows would share no block, and not be mixed at all
# How well a call's view tells equal rows from Gaussian ones by the variance of its rows' norms, as the area under the
# curve (chance .5) of 60 to 100 calls, 512 tokens, 256 noise rows: .99 after 2 rounds, .60 after 3, .46 after 4.
ROUNDS = 4
_STRIP = 200_000  # numbers that are un-mixed at a time: in float32 0.8 MB, and as much for what they become
POOL = 64  # Haar matrices of one size; a power of two, to be drawn from without rejection

Round = tuple[Tensor, Tensor]  # where each row of each part comes from, and then each part's blocks


def block_size(rows: int) -> int:
    """The size of the blocks that mix so many rows; the rows must be a multiple of it."""
    if rows <= 2 * BLOCK:
        return rows  # one block that mixes all, in each of two rounds
    return BLOCK if rows <= 2048 else LARGE_BLOCK


def round_count(rows: int) -> int:
    """How many rounds mix so many rows."""
    return ROUNDS if rows > block_size(rows) else 2


def mixed_rows(rows: int) -> int:
    """The least number of rows, at least ``rows``, that can be mixed."""
    return -(-rows // block_size(rows)) * block_size(rows)


class RowMixer(Secret):
    """Draws mixings from one stream, which continues from call to call: none is ever used twice."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._pools: dict[int, Tensor] = {}

    def draw(self, count: int, rows: int) -> "RowMixing":
        """``count`` independent mixings of so many rows each, a number that `mixed_rows` gives."""
        size = block_size(rows)
        rounds = [self._round(count, rows, size) for _ in range(round_count(rows))]
        return RowMixing(rounds, self._stream.permutations(count, rows))

    def _round(self, count: int, rows: int, size: int) -> Round:
        if size not in self._pools:
            self._pools[size] = haar_blocks(self._stream, POOL, size)
        blocks = count * rows // size
        chosen = self._pools[size][self._stream.indices(POOL, blocks)]
        left, right = self._stream.signs(2, blocks, size)
        signed = chosen.mul_(left[:, :, None]).mul_(right[:, None, :])
        return self._stream.permutations(count, rows), signed.view(count, -1, size, size)


class RowMixing(Secret):
    """One A for each of ``count`` parts; used for one call and thrown away.

    Parts are mixed one at a time, and wide ones in strips: what one round hands to the next then stays in a core's
    cache. Un-mixing 512 rows of GPT-2 small's q, k, v takes 20 ms so, and 58 ms as whole tensors (two cores).
    """

    def __init__(self, rounds: list[Round], last: Tensor) -> None:
        self._rounds, self._last = rounds, last

    def mix(self, z: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return A z, part by part, for z ``[count, rows, width]``, in z's dtype and rounded once to ``dtype``."""
        mixed = torch.empty(z.shape, dtype=dtype)
        for part, x in enumerate(z):
            for order, blocks in self._rounds:
                x = _blockwise(blocks[part], x.index_select(0, order[part]))
            mixed[part] = x.index_select(0, self._last[part])
        return mixed

    def unmix(self, y: Tensor, scale: Tensor, rows: int) -> Tensor:
        """Return the first ``rows`` rows of ``sum_i scale_i A_i^T y_i``, in y's dtype.

        Args:
            y: ``[count, all rows, width]``. scale: ``[count]``.
        """
        total = y.new_zeros(rows, y.shape[2])
        width = max(128, _STRIP // y.shape[1])
        after = self._last.argsort(dim=1)
        rounds = []
        for order, blocks in reversed(self._rounds):
            rounds.append((after, blocks.mT.to(y.dtype)))
            after = order.argsort(dim=1)
        after = after[:, :rows]
        for part, factor in enumerate(scale.tolist()):
            strips = torch.split(y[part], width, dim=1), torch.split(total, width, dim=1)
            for x, strip in zip(*strips, strict=True):
                for order, blocks in rounds:
                    x = _blockwise(blocks[part], x.index_select(0, order[part]))
                strip.add_(x.index_select(0, after[part]), alpha=factor)
        return total


def _blockwise(blocks: Tensor, x: Tensor) -> Tensor:
    return torch.bmm(blocks, x.view(len(blocks), -1, x.shape[1])).flatten(0, 1)
