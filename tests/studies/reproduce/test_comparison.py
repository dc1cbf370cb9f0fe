"""Items of two runs, compared: every difference is found, counted on its side, and measured."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obfuscatune.studies.reproduce.comparison import Flip, compare, is_right, mcnemar


def item(key: str, likelihoods: list[float], answers: list[int], greedy: tuple[int, ...] = ()) -> dict[str, Any]:
    best = likelihoods.index(max(likelihoods))
    same = {"choice": best, "choice_norm": best, "greedy": list(greedy)}
    return {"id": key, "answers": answers, "likelihoods": likelihoods, **same}


def test_differences_are_counted_on_their_side() -> None:
    ours = [item("a", [-1.0, -1.25], [0]), item("b", [-1.0, -2.0], [1]), item("c", [-3.0, -2.0], [1])]
    theirs = [item("a", [-1.5, -1.25], [0]), item("b", [-2.0, -1.0], [1]), item("c", [-3.0, -2.0], [1])]
    found = compare(ours, theirs)
    assert (found.items, found.lost, found.won, found.shift) == (3, 1, 1, 1.0)
    assert found.flips == (Flip("a", "choice choice_norm", 0.25, 0.5), Flip("b", "choice choice_norm", 1.0, 1.0))
    assert compare(ours, ours).flips == ()


def test_a_greedy_answer_is_a_prediction_too() -> None:
    ours, theirs = (item("a", [-1.0, -2.0], [0, 1], greedy) for greedy in ((0,), ()))
    assert is_right(ours) and not is_right(theirs)
    [flip] = compare([ours], [theirs]).flips
    assert flip.what == "greedy"
    # JSON gives a tuple back as a list.
    assert compare([ours], [{**ours, "greedy": (0,)}]).flips == ()


def test_other_items_are_refused() -> None:
    with pytest.raises(ValueError, match="different items"):
        compare([item("a", [-1.0, -2.0], [0])], [item("b", [-1.0, -2.0], [0])])


def test_mcnemar_by_hand() -> None:
    assert [mcnemar(0, 0), mcnemar(1, 0), mcnemar(3, 3)] == [1.0, 1.0, 1.0]
    assert mcnemar(0, 5) == 2 / 32
    assert mcnemar(1, 9) == 2 * (1 + 10) / 1024


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_a_probability_without_a_side(lost: int, won: int) -> None:
    assert mcnemar(lost, won) == mcnemar(won, lost)
    assert 0 < mcnemar(lost, won) <= 1
    assert mcnemar(lost, lost + won + 1) <= mcnemar(lost, lost)
