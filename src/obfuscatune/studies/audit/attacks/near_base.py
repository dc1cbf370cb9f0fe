r"""A27, a near base against a key on each side of a weight: singular vectors, their signs, the keys' structure.

``W* = R1^T W R2``. Where the singular values are distinct and ``W0 = U0 S V0^T`` is W, ``R1 = U0 D U*^T`` and
``R2 = V0 D V*^T`` with nothing unknown but the signs in D, which `audit.signs` finds because Monarch keys are far from
Gaussian. Where W0 is only near W, these are noisy estimates; `audit.blocks` finds blocks and orders in them, and then

    R1 = argmax tr(R1^T W0 R2 W*^T),   R2 = argmax tr(R2^T W0^T R1 W*)

over keys of that structure, in turns. What is left of the difference then is about the keys' share of freedoms, 2 d b
of d^2, see "a public base" in docs/security.md.

The attacker knows the keyed weight, the profile and the base; no rows, no queries. A square weight under two Monarch
keys is attacked, attention's last; those with a wider key on one side are not tried. Some ten seconds a weight at
d = 256 on one core. That it fails is no evidence of safety: it is one search.

Source: R11 in docs/security.md.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from obfuscatune.enclave.keys.monarch import block_sizes
from obfuscatune.studies.audit.algebra import key_success, polar, relative_error
from obfuscatune.studies.audit.attack import Attack, Knowledge, NotApplicableError, Sample, Score, Truth
from obfuscatune.studies.audit.blocks import Structure
from obfuscatune.studies.audit.signs import find_signs, trust_in

ROLE, STREAMS = "out", ("heads", "attention out")
_COARSE = 6  # turns with groups that may still change
_FINE = 12  # turns with those that were found
_BELIEVED = 2.0  # distance from the base, in units of what is expected, up to which a result is believed
_AGAIN = 3  # times that groups are looked for in the result


@dataclass(frozen=True, slots=True, repr=False)
class Found:
    """Both keys ``[d, d]`` of a weight, and the weight that they give."""

    first: Tensor
    second: Tensor
    weight: Tensor


def find_keys(near: Tensor, weight: Tensor, size: int) -> Found:
    """Keys of blocks of ``size`` between a base's weight and a keyed one, both ``[d, d]``, float64."""
    u0, s0, v0 = torch.linalg.svd(near)
    u, s, v = torch.linalg.svd(weight)
    signs = find_signs([(u0, u), (v0.mT, v.mT)], trust_in(s0, s))
    first, second = (u0 * signs) @ u.mT, (v0.mT * signs) @ v
    rough = Found(first, second, first @ weight @ second.mT)
    # The change of singular values is the diagonal of the difference between the singular vectors: it tells its size.
    believed = _BELIEVED * len(s) ** 0.5 * relative_error(s, s0)
    generator = torch.Generator().manual_seed(0)
    here, there = (Structure(key, size, generator) for key in (first, second))
    for _ in range(_COARSE):
        first, second = here.project(first), there.project(second)
        first, second = polar(near @ second @ weight.mT), polar(near.mT @ first @ weight)
        here.sharpen(first)
        there.sharpen(second)
    for _ in range(_AGAIN):
        first, second = here.fit(first), there.fit(second)
        for _ in range(_FINE):
            first, second = here.fit(near @ second @ weight.mT), there.fit(near.mT @ first @ weight)
        found = Found(first, second, first @ weight @ second.mT)
        if relative_error(found.weight, near) < believed:
            return found
        # Groups are looked for in what the base alone says: a key that was fitted to groups confirms them.
        first, second = polar(near @ second @ weight.mT), polar(near.mT @ first @ weight)
        here.sharpen(first)
        there.sharpen(second)
    return rough


def share_recovered(guess: Tensor, private: Tensor, base: Tensor) -> float:
    """``1 - |W^ - W|^2 / |W - W0|^2``, 0 at the least: the base itself is as good a guess then."""
    moved = (private - base).square().sum().clamp_min(1e-300)
    return max(0.0, 1.0 - ((guess - private).square().sum() / moved).item())


def _run(sample: Sample, knowledge: Knowledge) -> list[Found]:
    base, profile, view = knowledge.base, knowledge.profile, sample.view
    if base is None:
        raise NotApplicableError("no base")
    if view.segment(0, ROLE).whole:
        raise NotApplicableError("attention is whole on the worker, under keys of heads: see A3 and A5")
    if (profile.keys, profile.inner_keys) != ("monarch", "monarch"):
        raise NotApplicableError("no Monarch key on each side")
    sizes = block_sizes(base.width, profile.key_block)
    if len(set(sizes)) != 1 or len(sizes) == 1 or len(view.weight(0, ROLE)) != base.width:
        raise NotApplicableError("no square weight under keys of equal blocks, more than one of them")
    return [find_keys(base.weight(i, ROLE), view.weight(i, ROLE), sizes[0]) for i in range(view.blocks)]


def _score(guess: list[Found], truth: Truth) -> Score:
    """Mean over keys, right up to the one sign that both have in common; value: share of W - W0, mean over blocks."""
    keys, shares = [], []
    for block, found in enumerate(guess):
        first, second = (truth.keys[block, stream] for stream in STREAMS)
        sign = 1.0 if (found.first * first).sum() >= 0 else -1.0
        keys += [key_success(sign * found.first, first), key_success(sign * found.second, second)]
        private, base = (model.weight(block, ROLE) for model in (truth.private, truth.base))
        shares.append(share_recovered(found.weight, private, base))
    return Score(sum(keys) / len(keys), 0.0, sum(shares) / len(shares))


ATTACK = Attack(
    id="A27",
    title="two-sided keys: singular vectors, signs, structure",
    needs="B",
    source="R11 in docs/security.md",
    metric="1 - |Q - R| / (sqrt(2) |R|) of both keys of attention's last weight; value: share of |W - W0|^2 recovered",
    chance="0: an unrelated key",
    run=_run,
    score=_score,
    fires_on="strict+key_block=16",
    fires_at=0.9,
    by_tokens=False,
    exact=True,
)
