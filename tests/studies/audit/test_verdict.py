"""Figures to words, at the edges."""

import pytest

from obfuscatune.errors import UsageError
from obfuscatune.studies.audit.runner import Outcome, parse_budgets
from obfuscatune.studies.audit.verdict import (
    AS_CLAIMED,
    BROKEN,
    CHANCE,
    CLAIMS,
    LEAK,
    NONE,
    VOID,
    judge,
    negative,
    points_of,
    positive,
)


def outcomes(*successes: float, tokens: int = 64, chance: float = 0.1, profile: str = "strict", attack: str = "A11"):  # type: ignore[no-untyped-def]
    return [
        Outcome(profile, attack, tokens, seed, success, chance, None, None, 0.0)
        for seed, success in enumerate(successes)
    ]


def word(found, profile: str = "strict", attack: str = "A11", *, fires: bool = True, silent: bool = True) -> str:  # type: ignore[no-untyped-def]
    return judge(profile, attack, found, fires=fires, silent=silent).word


def test_words() -> None:
    chance, found = outcomes(0.1, 0.11, 0.09), outcomes(0.5, 0.52, 0.48)
    assert word(chance) == AS_CLAIMED
    assert word(found) == BROKEN
    assert word(chance, "balanced") == CHANCE
    assert word(found, "balanced") == LEAK
    assert word(chance, fires=False) == VOID
    assert word(found, fires=False) == BROKEN
    assert word(found, silent=False) == VOID
    nothing = [Outcome("", "", 64, 0, None, None, None, "no rows", 0.0)]
    assert word(nothing, "balanced") == word(nothing, "strict", "A16") == word(nothing, "shared", "A16") == NONE
    assert word(nothing, "strict") == word(nothing, "strict@1of2") == VOID
    assert judge("strict", "A11", nothing, fires=True, silent=True).failed


def test_what_strict_claims_would_be_broken_without_mixing() -> None:
    """A1, A3, A7 and A17 fail there for another reason than that rows are mixed, or nothing follows of it."""
    assert CLAIMS["strict"] == ("A11", "A12", "A14", "A21", "A23", "A24", "A26")


def test_a_claim_without_its_controls_fails() -> None:
    assert judge("strict", "A11", outcomes(0.1, 0.1), fires=False, silent=True).failed
    assert not judge("strict", "A11", outcomes(0.1, 0.1), fires=True, silent=True).failed
    assert not judge("balanced", "A11", outcomes(0.9, 0.9), fires=True, silent=True).failed


def test_broken_at_the_first_budget_above_chance() -> None:
    verdict = judge("strict", "A11", outcomes(0.1, 0.1) + outcomes(0.9, 0.9, tokens=256), fires=True, silent=True)
    assert (verdict.since, str(verdict)) == (256, "BROKEN 0.90 (chance 0.10) from 256 tokens")


@pytest.mark.parametrize(("success", "above"), [(0.119, False), (0.121, True)])
def test_few_seeds_have_some_slack(success: float, above: bool) -> None:
    assert points_of(outcomes(success, success))[0].above == above


def test_scattered_seeds_have_more() -> None:
    assert not points_of(outcomes(0.0, 0.1, 0.4))[0].above
    assert points_of(outcomes(0.19, 0.2, 0.21))[0].above


def test_controls() -> None:
    assert positive("A11", outcomes(0.95, 0.97), 0.9, "paper").passed
    assert not positive("A11", outcomes(0.95, 0.5), 0.9, "paper").passed
    assert negative("A11", outcomes(0.1, 0.1), "paper").passed
    assert not negative("A11", outcomes(0.3, 0.3), "paper").passed
    assert not negative("A11", [Outcome("paper", "A11", 64, 0, None, None, None, "no rows", 0.0)], "paper").passed
    assert not positive("A11", [Outcome("paper", "A11", 64, 0, None, None, None, "no rows", 0.0)], 0.9, "paper").passed


def test_budgets() -> None:
    assert parse_budgets("d/4, d,4d,100d", 128) == (32, 128, 512, 12800)
    assert parse_budgets("64,32", 128) == (32, 64)


@pytest.mark.parametrize("text", ["", "x", "d/0", "33", "0", "-32", "d/3d"])
def test_bad_budgets(text: str) -> None:
    with pytest.raises(UsageError):
        parse_budgets(text, 128)
