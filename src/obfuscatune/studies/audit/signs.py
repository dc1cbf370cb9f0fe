r"""Unknown signs of singular vectors, found because what they make up is far from Gaussian.

With ``W0 = U0 S V0^T`` and ``W* = U* S V*^T`` the keys on both sides of a weight are ``R1 = U0 D U*^T`` and
``R2 = V0 D V*^T``, D diagonal with entries +1 and -1. The entries of a key of few blocks have a larger fourth moment
than those of a rotation, so D maximizes ``sum R1^4 + sum R2^4``:

- *start*: ``M_ij = sum_k (sum_a u_ai u_aj u_ak^2) (sum_b v_bi v_bj v_bk^2)`` has D at its top, as in tensor PCA
  (Montanari and Richard, arXiv 1411.1076);
- *ascent*: on soft signs, by the gradient without what a sign adds to itself; then one flip after another.
"""

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # (u, v), each [d, d]: the key is u D v^T

_LONE = 0.2  # energy of one entry of a row from which the start leaves the row out
_STEPS = 60  # of the soft ascent; it settles in some ten
_STEEP = 1.5  # of the tanh that makes soft signs


def find_signs(pairs: list[Pair], trust: Tensor) -> Tensor:
    """Return signs ``[d]``, float64, right up to one common sign where they can be found.

    Args:
        trust: ``[d]``, 0 to 1: how well the base determines each singular vector. Three starts make more and more of
            it; the one with the largest fourth moment wins.
    """
    start = _start(pairs)
    found = []
    for power in range(3):
        weight = trust**power
        top = torch.linalg.eigh(start * weight[:, None] * weight).eigenvectors[:, -1]
        found.append(_flip(pairs, _ascend(pairs, top, weight)))
    return max(found, key=lambda signs: _moment(pairs, signs))


def trust_in(values: Tensor, keyed: Tensor) -> Tensor:
    """Share of each of the base's singular vectors that is still in the private model's, about ``[d]``.

    Neighbours at a distance below the change of singular values, ``values`` to ``keyed`` ``[d]``, are mixed.
    """
    change = (keyed - values).square().mean().clamp_min(1e-300)
    mixed = change / ((values[:, None] - values).square() + change)
    trust: Tensor = 1 / (1 + mixed.fill_diagonal_(0.0).sum(dim=1))
    return trust


def _start(pairs: list[Pair]) -> Tensor:
    d = pairs[0][0].shape[1]
    total = pairs[0][0].new_zeros(d, d)
    for u, v in pairs:
        # A row that is nearly one singular vector (an outlier's) would drown all others.
        u, v = (side * (side.square().amax(dim=1, keepdim=True) < _LONE) for side in (u, v))
        here, there = u.square() - 1 / d, v.square() - 1 / d
        for i in range(d):  # row by row: all at once are d^3 numbers
            total[i] += (((u[:, i, None] * u).mT @ here) * ((v[:, i, None] * v).mT @ there)).sum(dim=1)
    total.fill_diagonal_(0.0)
    return total


def _ascend(pairs: list[Pair], start: Tensor, weight: Tensor) -> Tensor:
    soft: Tensor = start * len(start) ** 0.5 / start.norm()
    for _ in range(_STEPS):
        slope = torch.zeros_like(soft)
        for u, v in pairs:
            key = (u * (soft * weight)) @ v.mT
            spread = key.square() - key.square().mean()
            slope += (u * ((key * (key.square() - 3 * key.square().mean())) @ v)).sum(dim=0)
            slope -= 3 * soft * weight * (u.square() * (spread @ v.square())).sum(dim=0)
        slope *= weight
        soft = torch.tanh(_STEEP * slope / slope.square().mean().sqrt().clamp_min(1e-300))
    return soft


def _flip(pairs: list[Pair], soft: Tensor) -> Tensor:
    """Flip the sign that gains most, until none gains."""
    signs = torch.where(soft < 0, -1.0, 1.0).to(soft.dtype)
    for _ in range(4 * len(signs)):
        gain = torch.zeros_like(signs)
        for u, v in pairs:  # of sum (key - 2 s x)^4, x = u_i v_i^T, by the powers of x
            key, u2, v2 = (u * signs) @ v.mT, u.square(), v.square()
            gain -= 8 * signs * (u * (key.pow(3) @ v)).sum(dim=0)
            gain += 24 * (u2 * (key.square() @ v2)).sum(dim=0)
            gain -= 32 * signs * (u2 * u * (key @ (v2 * v))).sum(dim=0)
            gain += 16 * u2.square().sum(dim=0) * v2.square().sum(dim=0)
        best = int(gain.argmax())
        if gain[best] <= 1e-12:
            break
        signs[best] *= -1
    return signs


def _moment(pairs: list[Pair], signs: Tensor) -> float:
    return sum(((u * signs) @ v.mT).pow(4).sum().item() for u, v in pairs)
