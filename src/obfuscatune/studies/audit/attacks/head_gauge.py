r"""A5, keys of heads are a gauge: products of a head's weights are free of them.

``[Wq|Wk|Wv]* = R^T [Wq M|Wk M^-T|Wv N]``, so ``G* = Wq* Wk*^T = R^T Wq Wk^T R`` for each head, in an unknown order.
Sums over heads of G, G G^T and G^T G are free of the order too. Their eigenvectors, matched with a base's, give R up
to signs; these follow from the sums in that basis (a rank-one sign problem). Then in turns: heads are matched, and R
is refined,

    R <- polar( sum_h G0_h R G*_h^T + G0_h^T R G*_h ).

R is found up to one sign, which no product of two of its columns shows. Between two sessions of one model nothing of
this is approximate: it gives R1^T R2 (see A12).

Where q and k are rotated by position, M is one complex factor z a plane and k has 1 / conj(z), so that conj(q) k is
free of it plane by plane. Planes stay in their places, as each has a frequency of its own: real and imaginary parts of
each, summed over heads, are as many more matrices that need no matching. A head of k serves all its query heads.

Source: A5 in docs/security.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from obfuscatune.enclave.families import AttentionShape
from obfuscatune.studies.audit.algebra import key_success, matching, polar
from obfuscatune.studies.audit.attack import Attack, Knowledge, NotApplicableError, Sample, Score, Truth

_ROUNDS = 20
_STARTS = 12  # mixtures of the sums
_EXACT = 0.9999  # agreement, of 1, from which no other start is tried


@dataclass(frozen=True, slots=True, repr=False)
class Products:
    """What of the weights of q and k is free of the heads' keys.

    Attributes:
        heads: ``Wq Wk^T`` ``[heads, d, d]``, in the weight's order of heads. planes: of each rotated plane, real and
            imaginary parts, all heads together ``[2 planes, d, d]``; none without rotation.
    """

    heads: Tensor
    planes: Tensor


def products(weight: Tensor, shape: AttentionShape) -> Products:
    """The products of a weight ``[d, q | k | v]``."""
    split = (shape.heads, shape.kv_heads, shape.kv_heads)
    q, k, _ = weight.unflatten(1, (-1, shape.head_dim)).split(split, dim=1)  # type: ignore[no-untyped-call]
    q, k = q.transpose(0, 1), k.repeat_interleave(shape.heads // shape.kv_heads, dim=1).transpose(0, 1)
    half = shape.rotary // 2
    # By plane: [planes, d, heads].
    (q1, q2), (k1, k2) = (x[..., : 2 * half].permute(2, 1, 0).split(half) if half else (x[:0], x[:0]) for x in (q, k))
    planes = torch.cat([q1 @ k1.mT + q2 @ k2.mT, q1 @ k2.mT - q2 @ k1.mT]) if half else weight.new_empty(0, 0, 0)
    return Products(q @ k.mT, planes)


def align(near: Products, keyed: Products) -> Tensor:
    """Return R ``[d, d]`` with ``keyed = R^T near R``, heads in some order."""
    near, keyed = (Products(_unit(part.heads), _unit(part.planes)) for part in (near, keyed))
    best, most = None, -1.0
    for start in _starts(near, keyed):
        key = _refine(near, keyed, start)
        reached = _agreement(near.heads, keyed.heads, key).max(dim=1).values.sum().item()
        if best is None or reached > most:
            best, most = key, reached
        if most > _EXACT:
            break
    if best is None:
        raise NotApplicableError("no start")
    return best


def _unit(parts: Tensor) -> Tensor:
    return parts / parts.norm() if len(parts) else parts


def _sums(parts: Products) -> Tensor:
    """Symmetric matrices that depend neither on the order of heads nor on their keys ``[n, d, d]``, of norm 1."""
    heads = parts.heads
    found = [heads.sum(0) + heads.sum(0).mT, (heads @ heads.mT).sum(0), (heads.mT @ heads).sum(0)]
    found += [plane + plane.mT for plane in parts.planes]
    return torch.stack([part / part.norm() for part in found])


def _starts(near: Products, keyed: Products) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    here, there = _sums(near), _sums(keyed)
    for _ in range(_STARTS):
        mix = torch.randn(len(here), 1, 1, generator=generator, dtype=torch.float64)
        u, v = (torch.linalg.eigh((mix * part).sum(0)).eigenvectors for part in (here, there))
        # All sums in their eigenvectors agree up to the signs of these, s_i s_j: the first eigenvector has them.
        agreement = ((u.mT @ here @ u) * (v.mT @ there @ v)).sum(0)
        signs = torch.linalg.eigh(agreement - agreement.diagonal().diag()).eigenvectors[:, -1].sign()
        yield (u * torch.where(signs == 0, 1.0, signs)) @ v.mT


def _agreement(near: Tensor, keyed: Tensor, key: Tensor) -> Tensor:
    """Inner products of each head of the base with each keyed one, undone ``[heads, heads]``."""
    return near.flatten(1) @ (key @ keyed @ key.mT).flatten(1).mT


def _refine(near: Products, keyed: Products, key: Tensor) -> Tensor:
    for _ in range(_ROUNDS):
        ordered = keyed.heads[matching(_agreement(near.heads, keyed.heads, key))]
        gradient = _pull(near.heads, ordered, key)
        if len(near.planes):
            gradient = gradient + _pull(near.planes, keyed.planes, key)
        key = polar(gradient)
    return key


def _pull(near: Tensor, keyed: Tensor, key: Tensor) -> Tensor:
    return (near @ key @ keyed.mT + near.mT @ key @ keyed).sum(0)


def _run(sample: Sample, knowledge: Knowledge) -> list[Tensor]:
    base = knowledge.base
    if base is None:
        raise NotApplicableError("no base")
    blocks = range(sample.view.blocks)
    parts = [(base.weight(i, "qkv"), sample.view.weight(i, "qkv")) for i in blocks]
    return [align(*(products(weight, knowledge.design.shape) for weight in pair)) for pair in parts]


def _score(guess: list[Tensor], truth: Truth) -> Score:
    true = [truth.keys[block, "attention in"] for block in range(len(guess))]
    found = [max(key_success(key, r), key_success(-key, r)) for key, r in zip(guess, true, strict=True)]
    return Score(sum(found) / len(found), 0.0)


ATTACK = Attack(
    id="A5",
    title="gauge of heads",
    needs="B",
    source="A5 in docs/security.md",
    metric="1 - |R^ - R| / (sqrt(2) |R|) of the key before q, k, v, up to its sign",
    chance="0: a random rotation",
    run=_run,
    score=_score,
    fires_on="balanced",
    fires_at=0.5,
    by_tokens=False,
)
