"""What the kernel computes, in plain torch and slowly: shares of rows, rows of replies. The kernel's bits are these."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from obfuscatune.protocol.residues import centred

Rules = Sequence[Sequence[Sequence[int]]]


def quantize(x: Tensor, column: Tensor, room: float, half: float) -> tuple[Tensor, Tensor]:
    """Return integers ``rint(x column scale)`` int64 ``[n, width]`` and the scales ``[n]``.

    The scale brings the norm of a row to ``room`` before rounding, which adds ``half`` at most. The norm is taken of
    integers of 19 bits, whose sum of squares is exact in any order. A row that is not finite gives zeros, and
    the scale NaN, of which its result will be.
    """
    t = x.double() * column
    top = t.abs().amax(dim=1)
    if room == 0:
        return t.round().long(), torch.ones_like(top)
    exponent = torch.frexp(top).exponent - 1 + 1023
    zero, finite = exponent < 18, torch.isfinite(top)
    coarse = torch.exp2((1041 - torch.where(zero | ~finite | (top == 0), 1041, exponent)).double())
    squares = (t * coarse[:, None]).nan_to_num().round().long().square().sum(dim=1)
    norms = torch.from_numpy(np.sqrt(squares.double().numpy()))  # torch's own root is not always the nearest number
    scales = room * coarse / (norms + half)
    scales = torch.where(zero | (top == 0), 1.0, scales)
    q = torch.where((zero | (top == 0) | ~finite)[:, None], 0.0, t * scales[:, None]).round().long()
    return q, torch.where(finite, scales, torch.nan)


def encode(
    primes: Sequence[int],
    x: Tensor,
    column: Tensor,
    drawn: Tensor,
    rules: Rules,
    room: float,
    half: float,
    vectors: Tensor,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return the shares that are made, the scales, and the images; shapes and arguments as in `coding.encode`.

    Share s of prime p: ``rules[p][s][0] X + sum_i rules[p][s][i] drawn[i] mod p``. Images: ``X v mod p``.
    """
    q, scales = quantize(x, column, room, half)
    made: list[list[Tensor]] = [[] for _ in rules[0]]
    images = []
    for i, p in enumerate(primes):
        residues = centred(q, p)
        for s, (own, *others) in enumerate(rules[i]):
            total = own * residues
            for c, plane in zip(others, drawn[:, i], strict=True):
                total = total + c * plane.long()
            made[s].append(centred(total, p).to(torch.int8))
        images.append(dots(residues, vectors[i], p))
    return [torch.stack(planes) for planes in made], scales, torch.stack(images, dim=1)


def decode(
    primes: Sequence[int],
    replies: Sequence[Tensor],
    rules: Sequence[Sequence[int]],
    vectors: Tensor,
    images: Tensor,
    scales: Tensor,
    column: Tensor,
) -> Tensor | None:
    """Return the rows of the products float32, or None where the check fails; arguments as in `coding.decode`.

    With ``c_p = sum_i rules[p][i] replies_i mod p`` the product is ``sum_p c_p M / p mod M``, centred.
    """
    modulus = math.prod(primes)
    total = torch.zeros(replies[0].shape[1:], dtype=torch.int64)
    for i, p in enumerate(primes):
        c = centred(
            sum((w * reply[i].long() for w, reply in zip(rules[i], replies, strict=True)), total.new_zeros(())), p
        )
        if not torch.equal(dots(c, vectors[i], p), images[:, i]):
            return None
        total = (total + c * (modulus // p)) % modulus  # below 2^63: |c| M / p < M / 2 < 2^53
    y = torch.where(total > modulus // 2, total - modulus, total)
    return (y.double() * column * (1 / scales)[:, None]).float()


def dots(residues: Tensor, vectors: Tensor, p: int) -> Tensor:
    """``residues . v mod p`` int16 ``[n, checks]``, for each of the vectors ``[checks, width]``."""
    if not len(vectors):
        return torch.zeros(len(residues), 0, dtype=torch.int16)
    return (residues.double() @ vectors.double().T).long().remainder(p).to(torch.int16)
