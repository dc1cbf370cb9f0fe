"""A27 at the deployed ratio: blocks of 32 at d = 256, where d / b^2 is .25 (GPT-2 small with blocks of 64: .19)."""

import copy
import os
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from obfuscatune.enclave.keys import MasterSecret
from obfuscatune.enclave.keys.monarch import monarch
from obfuscatune.profiles import resolve
from obfuscatune.studies.audit.algebra import key_success
from obfuscatune.studies.audit.attacks.near_base import find_keys, share_recovered
from obfuscatune.studies.audit.blocks import Structure
from obfuscatune.studies.audit.fixtures import Fixtures, bring_near
from obfuscatune.studies.audit.reference import Reference
from obfuscatune.studies.audit.signs import find_signs
from obfuscatune.studies.audit.study import failed_claims, make_plan, run
from obfuscatune.studies.audit.verdict import LEAK
from obfuscatune.studies.audit.view import ROLES

pytestmark = pytest.mark.slow

D, BLOCK = 256, 32


def draw(seed: int, d: int = D) -> Tensor:
    """A weight whose singular values spread as those of trained ones do: the largest some ten times the median."""
    left, _, right = torch.linalg.svd(
        torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    )
    return (left * torch.linspace(0.0, 3.0, d, dtype=torch.float64).neg().exp()) @ right


@cache
def key(seed: int, d: int = D, block: int = BLOCK) -> Tensor:
    return monarch(MasterSecret.from_insecure_test_seed(seed).stream("key"), d, block).dense().double()


def near(distance: float) -> tuple[Tensor, Tensor]:
    """A base, and a weight at that relative distance from it."""
    base = draw(1)
    change = torch.randn(D, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return base, base + change * (distance * base.norm() / change.norm())


def found_keys(base: Tensor, private: Tensor, block: int = BLOCK) -> tuple[float, float, float]:
    found = find_keys(base, key(1, D, block).mT @ private @ key(2, D, block), block)
    sign = 1.0 if (found.first * key(1, D, block)).sum() >= 0 else -1.0
    one, two = (key_success(sign * part, key(i, D, block)) for i, part in ((1, found.first), (2, found.second)))
    return one, two, share_recovered(found.weight, private, base)


def test_a_near_base_gives_both_keys_and_most_of_the_difference() -> None:
    one, two, share = found_keys(*near(0.01))
    assert min(one, two) > 0.97
    # R1: 2 d b freedoms against d^2 entries leave a quarter; large singular values, which decide, are better known.
    assert share > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("block", [BLOCK, 16])
@pytest.mark.parametrize("same_values", [True, False])
def test_an_unrelated_base_gives_nothing(same_values: bool, block: int) -> None:
    private = draw(1)
    base = draw(9) if same_values else torch.randn(D, D, generator=torch.Generator().manual_seed(9)).double()
    one, two, share = found_keys(base * (private.norm() / base.norm()), private, block)
    # The trace of two unrelated keys is of the order of 1, and a score half of its share of d = 256; measured 0.0018.
    assert max(one, two) < 0.02
    assert share < 0.1


def test_a_private_model_is_brought_to_a_distance(fixtures: Fixtures) -> None:
    model = copy.deepcopy(fixtures.private)
    bring_near(model, fixtures.base, 0.02)
    profile = resolve("strict")
    private, trained, base = (Reference(m, profile) for m in (model, fixtures.private, fixtures.base))
    moved = size = 0.0
    for block in range(base.blocks):
        for role in ROLES:
            ours, theirs, all_the_way = (m.weight(block, role) for m in (private, base, trained))
            moved += (ours - theirs).square().sum().item()
            size += theirs.square().sum().item()
            between = ((ours - theirs) * (all_the_way - theirs)).sum() / (
                (ours - theirs).norm() * (all_the_way - theirs).norm()
            )
            assert between > 0.999
    assert moved / size == pytest.approx(0.02**2, rel=0.01)


def test_signs_of_an_exact_base() -> None:
    left, _, right = torch.linalg.svd(draw(1))
    signs = torch.where(torch.rand(D, generator=torch.Generator().manual_seed(3)) < 0.5, -1.0, 1.0).double()
    pairs = [(left, key(1).mT @ left * signs), (right.mT, key(2).mT @ right.mT * signs)]
    assert (find_signs(pairs, torch.ones(D, dtype=torch.float64)) * signs).sum().abs() == D


def test_blocks_and_orders_of_a_noisy_key() -> None:
    true = key(1)
    noise = torch.randn(D, D, generator=torch.Generator().manual_seed(4), dtype=torch.float64) / D**0.5
    estimate = true + 0.15 * noise
    structure = Structure(estimate, BLOCK, torch.Generator().manual_seed(0))
    assert (structure.fit(estimate) - true).norm() < 0.5 * (estimate - true).norm()


@pytest.mark.slow
@pytest.mark.parametrize(("distance", "broken"), [(0.0, True), (0.02, True), (0.3, False)])
def test_how_near_a_base_must_be(distance: float, broken: bool) -> None:
    one, two, _ = found_keys(*near(distance))
    assert min(one, two) > 0.9 if broken else max(one, two) < 0.1


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif("OBFUSCATUNE_LONG" not in os.environ, reason="a whole audit with its training: OBFUSCATUNE_LONG=1")
def test_an_audit_at_the_deployed_width(tmp_path: Path) -> None:
    """Minutes, most of them training: keys of small blocks, recorded through the product, and the controls."""
    plan = make_plan(
        model="near-0.5",
        profiles=["strict+key_block=16"],
        knowledge=["N", "B"],
        attacks=["A27"],
        tokens="d",
        seeds=1,
    )
    _, findings = run(plan, tmp_path, command=["audit"])
    assert findings.conclusive
    assert failed_claims(findings) == []
    (found,) = findings.verdicts
    assert found.word == LEAK
