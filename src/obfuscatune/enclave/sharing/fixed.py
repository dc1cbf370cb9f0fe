"""Fixed point without overflow: rows and columns become integers whose products are below M / 2 by Cauchy-Schwarz.

    |x_i . w_k| <= |x_i| |w_k| <= most * max_k |w_k| <= .999 M / 2

A weight W ``[in, out]`` is rounded once: ``w = rint(balance W columns)``, one scale for each column, so that its norm
is about the root of M / 2, and a power of two for each row, below. A row of x gets the scale that makes its norm `most`
at most, whatever it is; scales stay in the enclave. The gradient's rows are divided by the columns' scales first, and
their bound is that of the rows of w. Rounding x and w is the only error; nothing is clipped. What only zeros multiply,
as the gradient of an output whose weights are all zero, is left out: a row's scale is that of its other numbers then.

A channel whose weights are small is often one whose activations are large. The power of two moves half of the
imbalance, in orders of magnitude, from x into W: then neither's rounding is that of its largest channel.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from obfuscatune.enclave.sharing.scheme import Scheme
from obfuscatune.errors import UnsupportedModelError, UsageError
from obfuscatune.protocol.residues import MOST_TERMS

ROOM = 0.999  # of M / 2: far more than float64 rounds
_MOST_INTEGER = 2.0**30  # of a row, in the kernel's 32 bits
_MOST_SHIFT = 20  # powers of two that a channel is moved by, at most
_LARGEST_ERROR = 0.5  # of a product's typical size: more is not a result


@dataclass(frozen=True, slots=True, repr=False)
class Side:
    """What the products with a weight, or with its transpose, need of it.

    Attributes:
        before: ``[in]`` float64, what the columns of x are multiplied by first. after: ``[out]``, and of the result.
        most: the largest norm of a row of integers. error: typical error of a product, relative to ``|x| |w|``.
    """

    before: Tensor
    after: Tensor
    most: float
    error: float


@dataclass(frozen=True, slots=True, repr=False)  # a repr would show the weight
class Fixed:
    """A weight as integers.

    Attributes:
        rows: ``W balance`` ``[in, out]`` float32. columns: the scales of its columns ``[out]`` float64.
        integers: ``rint(rows columns)`` ``[in, out]`` float64. forward, backward: products with them, with their
            transpose.
    """

    rows: Tensor
    columns: Tensor
    integers: Tensor
    forward: Side
    backward: Side


def fixed(weight: Tensor, scheme: Scheme, where: str) -> Fixed:
    """Return the integers of a weight ``[in, out]``.

    Raises:
        UnsupportedModelError: a weight that is not finite, or too wide for these primes.
    """
    plain = weight.detach().float()
    if not torch.isfinite(plain).all():
        raise UnsupportedModelError(
            "a weight is not finite", where=where, hint="the training run that made it diverged"
        )
    if max(plain.shape) > MOST_TERMS:
        raise UnsupportedModelError(
            "a weight is too wide for sums of 32 bits",
            got=list(plain.shape),
            expected=MOST_TERMS,
            where=where,
            hint="take another profile",
        )
    balance = _balance(plain.double())
    rows = plain * balance.float()[:, None]
    norms = rows.double().norm(dim=0)
    half = _half(rows.shape[0])
    size = math.sqrt(ROOM * scheme.modulus / 2)
    columns = max(size - half, 1.0) / torch.where(norms > 0, norms, torch.ones_like(norms))
    columns = torch.where(norms > 0, columns, torch.ones_like(norms))
    integers = (rows.double() * columns).round()  # ties to even, as the kernel's
    forward = _side(integers, scheme, before=1 / balance, after=1 / columns, where=where)
    backward = _side(integers.T, scheme, before=1 / columns, after=1 / balance, where=where)
    return Fixed(rows, columns, integers, forward, backward)


def _side(integers: Tensor, scheme: Scheme, *, before: Tensor, after: Tensor, where: str) -> Side:
    """The bound of rows that are multiplied by these integers ``[in, out]``."""
    width = integers.shape[0]
    largest = max(1.0, integers.norm(dim=0).max().item())
    most, half = min(ROOM * scheme.modulus / 2 / largest, _MOST_INTEGER), _half(width)
    # Rounding moves each number by 1 / sqrt(12) of a unit, on both sides; a typical product is |x| |w| / sqrt(in).
    sizes = [max(size - half, 1e-9) for size in (most, math.sqrt(ROOM * scheme.modulus / 2))]
    error = math.sqrt(width / 12) * math.hypot(*(1 / size for size in sizes))
    if error > _LARGEST_ERROR:
        raise UsageError(
            "too few primes for a weight of this width",
            got=f"{len(scheme.primes)} primes, width {width}",
            hint="one prime more",
            where=where,
        )
    return Side(torch.where(integers.any(dim=1), before, 0.0), after, most, error)


def _half(width: int) -> float:
    """The most that rounding adds to the norm of so many numbers."""
    return 0.5 * math.sqrt(width)


def _balance(weight: Tensor) -> Tensor:
    """Powers of two ``[in]`` that bring the rows' norms half of the way to the median, in orders of magnitude."""
    norms = weight.norm(dim=1)
    there = norms > 0
    if not there.any():
        return torch.ones_like(norms)
    logs = torch.where(there, norms, norms[there].median()).log2()
    shift = ((logs.median() - logs) / 2).round().clamp(-_MOST_SHIFT, _MOST_SHIFT)
    return torch.exp2(shift)
