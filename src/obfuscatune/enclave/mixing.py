r"""What a mixed call sends, as pure maths: rows completed to a multiple of an isometry, then mixed (profile `strict`).

The keyed rows are cut into tiles of w columns. For one tile X ``[n, w]``:

    Z = [X; U L^T] / sqrt(c),   L L^T = c I - X^T X,   c > |X|^2,   Y = A Z

with A ``[m, m]`` and U ``[w, w]`` orthogonal, secret and used once. By the choice of the noise rows Z^T Z = I exactly,
in every call and for whatever X; so Y^T Y = I too, and Y Y^T is a projector of rank w. The spectrum of neither depends
on X, nor does the scale. If A were uniform on the orthogonal group, Y would be uniform on the matrices with orthonormal
columns, and so independent of X altogether, whatever else is known (keys, weights, other rows of the same call). Each
tile has its own A, so that there is nothing between tiles either.

The worker returns ``Y W_t`` for the tile's rows W_t of the weight, and ``X W_t = sqrt(c) (A^T Y W_t)[:n]``. What that
costs in precision: rows of Y have the size of the noise, c / m in square, so rounding errors grow by about
sqrt(c / m) over the size of a row of X. No matrix is inverted.

Why not less. Noise with a given covariance, added to whatever the rows are, makes second moments isotropic on average
only: their changes from call to call still show the directions in which rows vary. Fewer noise rows than columns leave
directions without noise. An A that is not orthogonal would add nothing here, and cost precision.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from obfuscatune.enclave.keys.rows import RowMixer, RowMixing, mixed_rows
from obfuscatune.enclave.keys.source import Secret
from obfuscatune.errors import NotFiniteError

TILE_WIDTHS = (64, 128, 256, 512)
_MARGIN = 1.5  # of c over the estimate of |X|^2; nothing is inverted, so c I - X^T X may well be nearly singular
_POWER_STEPS = 6


def padded_rows(rows: int) -> int:
    """The row counts that the worker sees: 8, 32, 48, 64, 96, 128, 192, 256, 384 and so on."""
    if rows <= 32:
        return 8 if rows <= 8 else 32
    power = 1 << (rows - 1).bit_length()
    return power if rows > 3 * power // 4 else 3 * power // 4


def tile_width(rows: int, width: int, largest: int) -> int:
    """The width of a tile: near sqrt(128 rows), where noise rows and the un-mixing of tiles cost the same."""
    wanted = next((w for w in TILE_WIDTHS if w * w >= 90 * rows), TILE_WIDTHS[-1])
    fits = [w for w in TILE_WIDTHS if w <= min(width, wanted, largest)]
    return fits[-1] if fits else width


def tile_starts(width: int, tile: int) -> list[int]:
    """The first column of each tile. The last tile ends with the last column and may overlap the one before it."""
    return [min(start, width - tile) for start in range(0, width, tile)]


def cut(x: Tensor, rows: int, tile: int) -> Tensor:
    """Cut x ``[n, width]`` into tiles ``[tiles, rows, tile]``; zero where tiles overlap and in the padding rows."""
    starts = tile_starts(x.shape[1], tile)
    tiles = x.new_zeros(len(starts), rows, tile)
    for i, start in enumerate(starts):
        skipped = i * tile - start
        tiles[i, : len(x), skipped:] = x[:, start + skipped : start + tile]
    return tiles


def noise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return L^T ``[tiles, w, w]`` with ``x^T x + L L^T = c I``, and c ``[tiles]``, in float64; x ``[tiles, n, w]``.

    Raises: `NotFiniteError` where x is not finite, or its squares are not: nothing could hide it.
    """
    x = x.double()
    gram = torch.bmm(x.mT, x)
    if not torch.isfinite(gram).all():
        raise _not_finite()
    # The largest eigenvalue, from below; a start of all ones would be orthogonal to it for some x, a trace cannot be.
    probe = gram / gram.abs().amax(dim=(1, 2), keepdim=True).clamp_min(1e-300)
    probe = probe[:, :, : min(8, gram.shape[1])] + 1e-3
    for _ in range(_POWER_STEPS):
        probe = torch.bmm(gram, probe)
        probe = probe / probe.norm(dim=1, keepdim=True).clamp_min(1e-300)
    estimate = torch.bmm(gram, probe).norm(dim=1).amax(dim=1)
    least = gram.diagonal(dim1=1, dim2=2).amax(dim=1)
    scale = torch.maximum(estimate, least) * _MARGIN
    if not torch.isfinite(scale).all():
        raise _not_finite()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # all rows zero: then Z is noise alone
    identity = torch.eye(gram.shape[1], dtype=gram.dtype)
    while True:
        lower, info = torch.linalg.cholesky_ex(scale[:, None, None] * identity - gram)
        failed = info != 0
        if not failed.any():
            return lower.mT, scale
        scale = torch.where(failed, 2 * scale, scale)


def _not_finite() -> NotFiniteError:
    return NotFiniteError("rows that are not finite cannot be mixed", hint="a training run that diverged")


@dataclass(frozen=True, slots=True, repr=False)  # a repr would show the scales
class Mixed(Secret):
    """Rows on their way out, and what brings the result back.

    Attributes:
        sent: Y ``[tiles, m, w]``, of orthonormal columns: may leave the enclave.
    """

    sent: Tensor
    _mixing: RowMixing
    _scale: Tensor
    _sizes: Tensor

    def restore(self, y: Tensor) -> Tensor:
        """Return ``X W`` ``[n, out]`` from ``Y W_t`` ``[tiles, m, out]``; exactly 0 of a row of zeros.

        Rounding would make noise of it, and an optimizer like Adam a step as large as any of the noise in a gradient.
        """
        rows = self._mixing.unmix(y, self._scale, len(self._sizes))
        return (rows * self._sizes[:, None]).to(y.dtype)


def mix(x: Tensor, mixer: RowMixer, largest_tile: int) -> Mixed:
    """Complete and mix keyed rows x ``[n, width]``, float32 or float64."""
    rows = padded_rows(len(x))
    tile = tile_width(rows, x.shape[1], largest_tile)
    # Each row has a size of its own, else rounding errors would be those of the largest row: gradients at prompts, and
    # tokens beside one with a massive activation, are a thousandth of it and less.
    norms = x.double().norm(dim=1)
    sizes = norms / torch.frexp(norms).mantissa  # powers of two, so that nothing is rounded
    tiles = cut(x.double() / sizes.where(norms > 0, 1.0)[:, None], rows, tile)
    noise, scale = noise_rows(tiles)
    root = scale.sqrt()
    total = mixed_rows(rows + tile)
    z = torch.zeros(len(tiles), total, tile, dtype=torch.float64)
    z[:, :rows] = tiles / root[:, None, None]
    # U: without it a noise row is nearly a multiple of one coordinate, and a column of Y nearly one of A.
    z[:, rows : rows + tile] = mixer.draw(len(tiles), tile).mix(noise / root[:, None, None])
    mixing = mixer.draw(len(tiles), total)
    # In float64, and rounded once: of Y, which depends on no data. The rounding errors of float32 arithmetic depend on
    # what it is done with: 400 calls of 128 rows showed the rows' strongest direction by them, at 12 deviations.
    return Mixed(mixing.mix(z, x.dtype), mixing, root, sizes.where(norms > 0, 0.0))
