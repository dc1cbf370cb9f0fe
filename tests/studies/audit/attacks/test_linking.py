"""A24: streams of one session are tied together, streams of two are not."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from obfuscatune.studies.audit.attacks.linking import (
    ATTACK,
    Link,
    junctions,
    link,
    relative_error_of,
    relative_key_cosine,
)
from obfuscatune.studies.audit.fixtures import Fixtures
from obfuscatune.studies.audit.lab import Recorded, knowledge, record

pytestmark = pytest.mark.slow


def relative_key_error(guess: Tensor, into: Tensor, out: Tensor) -> float:
    return relative_error_of(relative_key_cosine(guess, into, out))


PLACES = ((0, "attention in"), (0, "attention out"), (0, "mlp in"))


def toy(
    rows: int, width: int = 24, seed: int = 0
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Keyed rows before and of a sublayer and after it, and their keys."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    keys = tuple(torch.linalg.qr(draw(width, width)).Q for _ in range(3))
    residual, added, bias = draw(rows, width) * (1 + draw(rows, 1).abs()), draw(rows, width), draw(width)

    def norm(x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[1:])

    streams = norm(residual) @ keys[0], added @ keys[1], norm(residual + added + bias) @ keys[2]
    return streams, keys  # type: ignore[return-value]


def test_relative_keys_of_a_residual_sum() -> None:
    (x, o, y), (a, b, c) = toy(4 * 24)
    found = link(PLACES, x, o, y)
    assert relative_key_error(found.carried, a, c) < 1e-3
    assert relative_key_error(found.joined, b, c) < 1e-3
    assert found.residual < 1e-5


def test_the_constant_and_the_scale_make_the_sum() -> None:
    (x, o, y), _ = toy(6 * 24)
    found = link(PLACES, x, o, y)
    mapped = torch.stack([x @ found.carried, o @ found.joined + found.constant], dim=2)
    fitted = mapped @ torch.linalg.lstsq(mapped, y[:, :, None]).solution
    assert ((fitted[:, :, 0] - y).norm() / y.norm()) < 1e-3


def test_unrelated_rows_are_not_linked() -> None:
    (x, o, _), (a, b, _) = toy(4 * 24)
    (_, _, y), (_, _, c) = toy(4 * 24, seed=1)
    found = link(PLACES, x, o, y)
    assert relative_key_error(found.carried, a, c) > 0.9
    assert relative_key_error(found.joined, b, c) > 0.9


def test_a_sixth_of_a_map_is_a_sixth_and_none_is_none() -> None:
    """Success is what was found, not its square: a cosine of .17 is far above that of unrelated keys."""
    _, (a, b, c) = toy(1)
    keys = dict(zip(PLACES, (a, b, c), strict=True))
    for part, least, most in ((0.17, 0.14, 0.20), (1.0, 0.999, 1.001), (0.0, -0.03, 0.03)):
        guesses = []
        for into in (a, b):
            true = torch.linalg.solve(into, c)
            other = torch.randn(24, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
            other = other - (other * true).sum() / true.square().sum() * true
            guesses.append(part * true / true.norm() + (1 - part**2) ** 0.5 * other / other.norm())
        found = Link(*PLACES, *guesses, torch.zeros(24, dtype=torch.float64), 0.0)
        assert least < ATTACK.score([found], SimpleNamespace(keys=keys)).success < most  # type: ignore[arg-type]


def test_one_key_for_all_is_seen_at_once() -> None:
    """As in `stream`, where biases and the norm's centring are in what is added."""
    generator = torch.Generator().manual_seed(0)
    key = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64)).Q
    x, o = (torch.randn(8, 24, generator=generator, dtype=torch.float64) for _ in range(2))
    x, o = (part - part.mean(dim=1, keepdim=True) for part in (x, o))
    x, y = (torch.nn.functional.layer_norm(part, (24,)) for part in (x, 3 * x + o))
    found = link(PLACES, x @ key, o @ key, y @ key)
    torch.testing.assert_close(found.carried, torch.eye(24, dtype=torch.float64))


def guess_and_score(session: Recorded, attacked: Recorded, tokens: int) -> float:
    sample, truth = session.cut(tokens)
    told = knowledge(attacked, "N", None, torch.zeros(1, 32, dtype=torch.long), {}, truth)
    return ATTACK.score(ATTACK.run(sample, told), truth).success


@pytest.mark.parametrize("profile", ["paper", "balanced", "balanced+attention=enclave+mlp=enclave"])
def test_static_keys_fall_to_a_prompt_of_four_widths(profile: str, recorded: Callable[[str], Recorded]) -> None:
    assert guess_and_score(recorded(profile), recorded(profile), 256) > 0.85


def test_mixed_rows_are_not_linked(recorded: Callable[[str], Recorded]) -> None:
    assert guess_and_score(recorded("strict"), recorded("strict"), 256) < 0.03


def test_streams_of_two_sessions_are_not_linked(recorded: Callable[[str], Recorded], fixtures: Fixtures) -> None:
    """The attack's own negative control: rows of one session, and what is said to come of them from another's."""
    here, there = recorded("balanced"), record(fixtures, "balanced", 1, (256,))
    view, other = here.sample.view, there.sample.view
    places = list(junctions(view.blocks))
    assert places
    for first, added, last in places:
        found = link((first, added, last), view.rows(*first), view.rows(*added), other.rows(*last))
        into, out, end = here.truth.keys[first], here.truth.keys[added], there.truth.keys[last]
        assert relative_key_error(found.carried, into, end) > 0.95
        assert relative_key_error(found.joined, out, end) > 0.95
