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

from obfuscatune.enclave.keys.orthogonal import haar_blocks
from obfuscatune.enclave.keys.source import Secret, Stream

BLOCK = 64
LARGE_BLOCK = 128  # above 2048 rows: with b^2 < m many pairs of rows would share no block, and not be mixed at all
# How well a call's view tells equal rows from Gaussian ones by the variance of its rows' norms, as the area under the
# curve (chance .5) of 60 to 100 calls, 512 tokens, 256 noise rows: .99 after 2 rounds, .60 after 3, .46 after 4.
ROUNDS = 4
# Numbers that are mixed at a time: enough that small calls are few operations, few enough to stay in a core's cache.
_AT_ONCE = 200_000
_SMALL_AT_ONCE = 1_000_000  # of parts below _AT_ONCE, as in decoding, where operations cost more than memory does
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

    Large parts are mixed one at a time, and wide ones in strips, so that what one round hands to the next stays in a
    core's cache. Un-mixing 512 rows of GPT-2 small's q, k, v takes half as long as with whole tensors (two cores).
    """

    def __init__(self, rounds: list[Round], last: Tensor) -> None:
        self._rounds, self._last = rounds, last

    def mix(self, z: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return A z, part by part, for z ``[count, rows, width]``, in z's dtype and rounded once to ``dtype``."""
        mixed = torch.empty(z.shape, dtype=dtype)
        for parts in _groups(len(z), z[0].numel(), _AT_ONCE):
            x = z[parts]
            for order, blocks in self._rounds:
                x = _blockwise(blocks[parts], _gather(x, order[parts]))
            mixed[parts] = _gather(x, self._last[parts])
        return mixed

    def unmix(self, y: Tensor, scale: Tensor, rows: int) -> Tensor:
        """Return the first ``rows`` rows of ``sum_i scale_i A_i^T y_i``, in y's dtype.

        Args:
            y: ``[count, all rows, width]``. scale: ``[count]``.
        """
        total = y.new_zeros(rows, y.shape[2])
        after = self._last.argsort(dim=1)
        rounds = []
        for order, blocks in reversed(self._rounds):
            rounds.append((after, blocks.mT.to(y.dtype)))
            after = order.argsort(dim=1)
        after = after[:, :rows]
        width = max(128, _AT_ONCE // y.shape[1])
        for parts in _groups(len(y), y[0].numel(), _SMALL_AT_ONCE if width >= y.shape[2] else _AT_ONCE):
            factors = scale[parts].tolist()
            strips = torch.split(y[parts], width, dim=2), torch.split(total, width, dim=1)
            for x, strip in zip(*strips, strict=True):
                for order, blocks in rounds:
                    x = _blockwise(blocks[parts], _gather(x, order[parts]))
                for part, factor in zip(_gather(x, after[parts]), factors, strict=True):
                    strip.add_(part, alpha=factor)
        return total


def _groups(count: int, size: int, most: int) -> list[slice]:
    """Parts of so many numbers each, as many at a time as ``most`` allows, and at least one."""
    step = max(1, most // max(1, size))
    return [slice(start, start + step) for start in range(0, count, step)]


def _gather(x: Tensor, order: Tensor) -> Tensor:
    """Rows of each part of x ``[parts, rows, width]`` in its order ``[parts, n]``: ``[parts, n, width]``."""
    if len(x) == 1:
        return x[0].index_select(0, order[0])[None]
    flat = (order + x.shape[1] * torch.arange(len(x))[:, None]).flatten()
    return x.flatten(0, 1).index_select(0, flat).view(*order.shape, x.shape[2])


def _blockwise(blocks: Tensor, x: Tensor) -> Tensor:
    """Blocks ``[parts, k, b, b]`` times the rows of each part of x ``[parts, k b, width]``."""
    return torch.bmm(blocks.flatten(0, 1), x.reshape(-1, blocks.shape[-1], x.shape[2])).view(x.shape)
