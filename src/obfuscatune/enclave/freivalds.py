r"""Freivalds' check of every product that the worker returns: ``y = x W`` against a secret vector.

Once for a segment: R ``[out, k]`` of Gaussian numbers, S = W R in float64. A product is accepted if for each of its
rows and each column of R

    |y r - x s| <= tau (|y| + |x| |W|_F / sqrt(in)),

for the cost of k (in + out) multiply-adds a row instead of in * out. The right side is the typical size of a row of the
product, tau eight times the rounding error of an honest one, relative to it (`NOISE`, measured). For an error e of a
row, e r is normal with standard deviation |e|: an honest row is refused with probability below 1e-15, and one wrong by
rho of its size passes with probability (.8 tau / rho)^k. With k as in `CHECKS` that is at most 2^-40 for a row that
is wrong as a whole (rho = 1), and for any rho above .0066 in float32. Errors below tau are not seen: they are what
rounding does. The vectors stay secret as long as nothing is told about them but "all was right": the session ends at
the first fault. A row whose squares have no room in the arithmetic of the check, because it is very large or very
small, is brought to the size of 1 first: else an infinite right side would let anything pass, and one of zero nothing.
Source: Freivalds, "Probabilistic machines can use less running time", IFIP 1977; for float products in an enclave:
Tramer and Boneh, "Slalom", ICLR 2019.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from obfuscatune.enclave.keys.source import Secret, Stream
from obfuscatune.enclave.session import Session

# Root mean square over rows of |y r - x s| over the right side without tau, of honest products, above what was measured
# on a CPU at widths 128 to 8192. One row is summed in order, and more so the wider it is: 8.1e-7 in float32 at 8192,
# 2.6e-7 at 768. From eight rows on it is 2.4e-7, and 8.4e-4 in bfloat16.
NOISE = {torch.float64: 5e-15, torch.float32: 1e-6, torch.bfloat16: 1.7e-3}
FACTOR = 8.0
CHECKS = {torch.float64: 2, torch.float32: 4, torch.bfloat16: 7}
_FEW = 16  # rows up to which the check itself is in float64, at no cost; in float32 its sums of few rows are the noise


class Check(Secret):
    """Verifies products with one weight ``[in, out]``, exactly as it was shipped, and with its transpose."""

    def __init__(self, weight: Tensor, stream: Stream) -> None:
        count = CHECKS[weight.dtype]
        exact = weight.double()
        size = exact.norm().item()
        self._tolerance = FACTOR * NOISE[weight.dtype]
        # By whether the product is with the transpose: R, S, and the typical |y| / |x|.
        self._sides: list[tuple[Tensor, Tensor, float]] | None = []
        for matrix in (exact, exact.T):
            vectors = stream.normal(matrix.shape[1], count)
            self._sides.append((vectors, matrix @ vectors, size / matrix.shape[0] ** 0.5))

    def require(
        self,
        session: Session,
        layer: str,
        x: Tensor,
        y: Tensor,
        *,
        transpose: bool = False,
        starts: Sequence[int] = (0,),
    ) -> None:
        """Refuse y ``[..., out]`` unless it is ``x W`` for x ``[..., in]`` in all rows.

        Args:
            starts: the first row of W that each tile is for; x is ``[tiles, rows, w]``, y ``[tiles, rows, out]`` then.

        Raises: `WorkerFault`, after which the session and these vectors are of no use any more.
        """
        if self._sides is None or not self.holds(x, y, transpose=transpose, starts=starts):
            self._sides = None
            raise session.fault("a product is wrong", layer, got="a backward" if transpose else "a forward")

    def holds(self, x: Tensor, y: Tensor, *, transpose: bool = False, starts: Sequence[int] = (0,)) -> bool:
        """Say whether all rows pass. Shapes as in `require`."""
        if self._sides is None:
            return False
        vectors, images, gain = self._sides[transpose]
        width, tiles = x.shape[-1], len(starts)
        few, exact = x.numel() <= _FEW * tiles * width, x.dtype
        dtype = torch.float64 if few or x.dtype == torch.float64 else torch.float32
        x, y = (t.reshape(tiles, -1, t.shape[-1]).to(dtype) for t in (x, y))
        parts = torch.stack([images[start : start + width] for start in starts]).to(dtype)
        # From the left: a product of a few rows with many columns is ten times faster than its transpose, and rounds
        # less (rms 2.6e-7 and 8.6e-7 of |y| at 2304 columns).
        returned = (vectors.T.to(dtype) @ y.flatten(0, 1).T).view(-1, *y.shape[:2]).transpose(0, 1)
        gap = returned - torch.bmm(parts.mT, x.mT)  # [tiles, k, rows]
        of_x, of_y = gain * x.norm(dim=2), y.norm(dim=2)
        least = torch.finfo(exact).tiny ** 0.4
        fits = (of_x > least) & (of_y > least) & (of_x + of_y < torch.inf)
        passes = (gap.abs() <= self._tolerance * (of_x + of_y)[:, None]).all(dim=1)  # written so that NaN is refused
        if not (passes | ~fits).all():
            return False
        return all(
            self._holds_scaled(x[tile, odd], y[tile, odd], (vectors, images[start : start + width], gain), exact)
            for tile, start in enumerate(starts)
            if (odd := ~fits[tile]).any()
        )

    def _holds_scaled(self, x: Tensor, y: Tensor, side: tuple[Tensor, Tensor, float], exact: torch.dtype) -> bool:
        """Say whether rows pass that are brought to the size of 1.

        Numbers below the least normal one are rounding, of x as of y: products in bfloat16 take them as zero, and what
        is missing in x is missing in y times the gain.
        """
        vectors, images, gain = side
        x, y = x.double(), y.double()
        largest = torch.maximum(x.abs().amax(dim=1), y.abs().amax(dim=1)).clamp_min(torch.finfo(torch.float64).tiny)
        x, y = x / largest[:, None], y / largest[:, None]
        gap = (y @ vectors - x @ images).abs().amax(dim=1)
        size = y.norm(dim=1) + gain * x.norm(dim=1)
        slack = torch.finfo(exact).tiny * (max(gain, 1.0) * x.shape[1] + y.shape[1]) / largest
        return bool((gap <= self._tolerance * size + slack).all())
