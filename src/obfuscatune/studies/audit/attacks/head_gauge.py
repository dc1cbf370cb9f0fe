r"""A5, keys of heads are a gauge: products of a head's weights are free of them.

``[Wq|Wk|Wv]* = R^T [Wq M|Wk M^-T|Wv N]``, so ``G* = Wq* Wk*^T = R^T Wq Wk^T R`` for each head, in an unknown order.
Sums over heads of G, G G^T and G^T G are free of the order too. Their eigenvectors, matched with a base's, give R up
to signs; these follow from the sums in that basis (a rank-one sign problem). Then in turns: heads are matched, and R
is refined,

    R <- polar( sum_h G0_h R G*_h^T + G0_h^T R G*_h ).

R is found up to one sign, which no product of two of its columns shows. Between two sessions of one model nothing of
this is approximate: it gives R1^T R2 (see A12).

Source: A5 in docs/security.md.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from obfuscatune.studies.audit.algebra import key_success, matching, polar
from obfuscatune.studies.audit.attack import Attack, Knowledge, NotApplicableError, Sample, Score, Truth

_ROUNDS = 20
_STARTS = 12  # mixtures of the sums
_EXACT = 0.9999  # agreement, of 1, from which no other start is tried


def products(weight: Tensor, heads: int) -> Tensor:
    """``Wq Wk^T`` ``[heads, d, d]`` of a weight ``[d, 3d]``."""
    q, k, _ = weight.unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)  # type: ignore[no-untyped-call]
    return q @ k.mT  # type: ignore[no-any-return]


def align(near: Tensor, keyed: Tensor) -> Tensor:
    """Return R ``[d, d]`` with ``keyed_h = R^T near_h R`` in some order of heads ``[heads, d, d]``."""
    near, keyed = near / near.norm(), keyed / keyed.norm()
    best, most = None, -1.0
    for start in _starts(near, keyed):
        key = _refine(near, keyed, start)
        reached = _agreement(near, keyed, key).max(dim=1).values.sum().item()
        if best is None or reached > most:
            best, most = key, reached
        if most > _EXACT:
            break
    if best is None:
        raise NotApplicableError("no start")
    return best


def _sums(parts: Tensor) -> Tensor:
    """Symmetric matrices that depend neither on the order of heads nor on their keys ``[3, d, d]``, of norm 1."""
    found = [parts.sum(0) + parts.sum(0).mT, (parts @ parts.mT).sum(0), (parts.mT @ parts).sum(0)]
    return torch.stack([part / part.norm() for part in found])


def _starts(near: Tensor, keyed: Tensor) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    here, there = _sums(near), _sums(keyed)
    for _ in range(_STARTS):
        mix = torch.randn(3, 1, 1, generator=generator, dtype=torch.float64)
        u, v = (torch.linalg.eigh((mix * part).sum(0)).eigenvectors for part in (here, there))
        # Both sums in their eigenvectors agree up to the signs of these, s_i s_j: the first eigenvector has them.
        agreement = ((u.mT @ here @ u) * (v.mT @ there @ v)).sum(0)
        signs = torch.linalg.eigh(agreement - agreement.diagonal().diag()).eigenvectors[:, -1].sign()
        yield (u * torch.where(signs == 0, 1.0, signs)) @ v.mT


def _agreement(near: Tensor, keyed: Tensor, key: Tensor) -> Tensor:
    """Inner products of each head of the base with each keyed one, undone ``[heads, heads]``."""
    return near.flatten(1) @ (key @ keyed @ key.mT).flatten(1).mT


def _refine(near: Tensor, keyed: Tensor, key: Tensor) -> Tensor:
    for _ in range(_ROUNDS):
        ordered = keyed[matching(_agreement(near, keyed, key))]
        key = polar((near @ key @ ordered.mT + near.mT @ key @ ordered).sum(0))
    return key


def _run(sample: Sample, knowledge: Knowledge) -> list[Tensor]:
    base = knowledge.base
    if base is None:
        raise NotApplicableError("no base")
    blocks = range(sample.view.blocks)
    parts = [(base.weight(i, "qkv"), sample.view.weight(i, "qkv")) for i in blocks]
    return [align(*(products(weight, knowledge.heads) for weight in pair)) for pair in parts]


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
