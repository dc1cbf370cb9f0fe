"""A1 to A6, A12, A16: attacks on weights, exact where nothing was fine-tuned."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from obfuscatune.enclave.families import AttentionShape
from obfuscatune.enclave.keys import ConcatKey, MasterSecret, head_keys
from obfuscatune.studies.audit.algebra import polar
from obfuscatune.studies.audit.attack import NotApplicableError, Score
from obfuscatune.studies.audit.attacks import all_attacks, procrustes, structured, two_sided
from obfuscatune.studies.audit.attacks.head_gauge import align, products
from obfuscatune.studies.audit.fixtures import Fixtures
from obfuscatune.studies.audit.lab import Recorded, knowledge

pytestmark = pytest.mark.slow

Attacked = Callable[..., Score]
WITH_KEYED_HEADS = ["balanced", "stream"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_base_itself_is_found_under_one_key() -> None:
    weight = draw(16, 48)
    torch.testing.assert_close(procrustes.by_rotation(weight, polar(draw(16, 16, seed=1)) @ weight), weight)
    torch.testing.assert_close(procrustes.by_any_map(weight, draw(16, 16, seed=1) @ weight), weight)


def test_under_two_keys_too() -> None:
    weight = draw(16, 48)
    keyed = polar(draw(16, 16, seed=1)) @ weight @ polar(draw(48, 48, seed=2))
    torch.testing.assert_close(two_sided.nearest_by_values(weight, keyed), weight)
    assert (procrustes.by_rotation(weight, keyed) - weight).norm() > weight.norm() / 2


@pytest.mark.parametrize("seed", range(4))
def test_head_keys_are_a_gauge(seed: int) -> None:
    weight, key = draw(16, 48, seed=seed), polar(draw(16, 16, seed=seed + 10))
    q, k, v = (key.mT @ weight).split(16, dim=1)
    parts: list[list[Tensor]] = [[], [], []]
    for head in (2, 0, 3, 1):
        m, n = draw(4, 4, seed=head + 20), draw(4, 4, seed=head + 30)
        for part, block, gauge in zip(parts, (q, k, v), (m, torch.linalg.inv(m).mT, n), strict=True):
            part.append(block[:, 4 * head : 4 * head + 4] @ gauge)
    keyed = torch.cat([torch.cat(part, dim=1) for part in parts], dim=1)
    shape = AttentionShape(heads=4, kv_heads=4, head_dim=4, scale=0.5)
    found = align(products(weight, shape), products(keyed, shape))
    assert min((found - key).norm(), (found + key).norm()) < 1e-6


@pytest.mark.parametrize("rotary", [4, 2])
def test_keys_of_grouped_and_rotated_heads_are_a_gauge_too(rotary: int) -> None:
    """By the enclave's own keys: one complex factor a plane, groups and the heads in them in a secret order."""
    shape = AttentionShape(heads=4, kv_heads=2, head_dim=4, scale=0.5, rotary=rotary)
    stream = MasterSecret.from_insecure_test_seed(3).stream("heads")
    heads = head_keys(stream, heads=4, kv_heads=2, head_dim=4, rotary=rotary, kappa=4.0)
    weight, key = draw(16, 32), polar(draw(16, 16, seed=10))
    keyed = ConcatKey([heads.q, heads.k, heads.v]).apply(key.mT @ weight)
    near, found = products(weight, shape), products(keyed, shape)
    assert len(found.planes) == rotary
    torch.testing.assert_close(key @ found.planes @ key.mT, near.planes)
    assert not torch.allclose(key @ found.heads @ key.mT, near.heads)  # in another order
    guess = align(near, found)
    assert min((guess - key).norm(), (guess + key).norm()) < 1e-6


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_blocks_of_monarch_keys_are_found_where_there_are_zeros(seed: int) -> None:
    blocks = [
        torch.block_diag(*(polar(draw(8, 8, seed=1000 * seed + 16 * i + j)) for j in range(16))) for i in range(2)
    ]
    p = [torch.randperm(128, generator=torch.Generator().manual_seed(10 * seed + i)) for i in range(3)]
    key = blocks[0][p[0]][:, p[1]] @ blocks[1][:, p[2]]
    noisy = key + 0.003 * draw(128, 128, seed=99 + seed)
    assert (structured.project(noisy, 8, 0.15) - key).norm() < 0.4 * (noisy - key).norm()


@pytest.mark.parametrize(
    ("attack", "profile", "least"),
    [
        ("A1", "paper", 0.6),
        ("A2", "naive", 0.3),
        *((name, profile, 0.6) for name in ("A3", "A5", "A6", "A12", "A16") for profile in WITH_KEYED_HEADS),
    ],
)
def test_what_it_breaks(attack: str, profile: str, least: float, attacked: Attacked) -> None:
    assert attacked(all_attacks()[attack], profile).success > least


@pytest.mark.parametrize("attack", ["A1", "A2", "A3", "A5", "A12"])
def test_what_it_does_not(attack: str, attacked: Attacked) -> None:
    score = attacked(all_attacks()[attack], "strict")
    assert score.success < score.chance + 0.1


@pytest.mark.parametrize("attack", ["A1", "A3", "A5", "A6", "A16"])
def test_an_unrelated_base_helps_nothing(attack: str, recorded: Callable[[str], Recorded], fixtures: Fixtures) -> None:
    found, session = all_attacks()[attack], recorded("balanced")
    sample, truth = session.cut(256)
    told = knowledge(session, found.needs, fixtures.unrelated, fixtures.text["corpus"][-64:], {}, truth)
    score = found.score(found.run(sample, told), truth)
    assert score.success < score.chance + 0.05


@pytest.mark.parametrize(
    ("attack", "profile"),
    [("A4", "balanced"), ("A16", "paper"), ("A16", "strict"), ("A27", "balanced"), ("A27", "strict")],
)
def test_it_says_where_there_is_nothing(attack: str, profile: str, attacked: Attacked) -> None:
    with pytest.raises(NotApplicableError):
        attacked(all_attacks()[attack], profile)
