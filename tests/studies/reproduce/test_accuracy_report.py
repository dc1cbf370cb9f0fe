"""What the accuracy study says of its numbers: one item of one seed is a rounding of the mean, two are not."""

from pathlib import Path
from typing import Any

import pytest

from obfuscatune.studies.reports.tables import read_csv
from obfuscatune.studies.reproduce.accuracy_report import findings
from obfuscatune.studies.reproduce.accuracy_rows import table_rows
from obfuscatune.studies.reproduce.presets import UNPROTECTED

RESULTS = Path(__file__).parents[3] / "docs" / "results"
SAYS = "within the spread of unprotected's seeds, or one item, in"


def summary(points: float, *, seeds: int = 3, std: float = 0.0) -> dict[str, Any]:
    what = {"model": "m", "task": "t", "dtype": "float32", "method": "paper", "seeds": seeds, "items": 32}
    return {**what, "mean": 100 + points, "points": points, "reference std": std, "nll": 1.0, "reference nll": 1.0}


@pytest.mark.parametrize(
    ("lost", "seeds", "within"), [(0, 3, 1), (1, 3, 1), (2, 3, 0), (3, 3, 0), (1, 1, 1), (2, 1, 0)]
)
def test_one_item_is_one_of_all_runs_together(lost: int, seeds: int, within: int) -> None:
    mean = sum(100 * (32 - (lost if seed == 0 else 0)) / 32 for seed in range(seeds)) / seeds
    [said] = findings([], [summary(mean - 100, seeds=seeds)], [])
    assert f"{SAYS} {within} of 1 cells" in said


@pytest.mark.parametrize(("seeds", "shown"), [(1, "98.0"), (3, "98.0 ± 0.0")])
def test_one_seed_has_no_spread(seeds: int, shown: str) -> None:
    [row] = table_rows([{**summary(-2.0, seeds=seeds), "metric": "acc", "std": 0.0}])
    assert row["paper"] == shown


def test_what_seeds_do_by_themselves_is_within() -> None:
    [said] = findings([], [summary(-2.0, std=2.5)], [])
    assert f"{SAYS} 1 of 1 cells" in said


@pytest.mark.parametrize("study", ["accuracy", "accuracy-shared"])
def test_committed_reports_say_what_their_numbers_give(study: str) -> None:
    rows = [
        {name: _number(value) for name, value in row.items()}
        for row in read_csv(RESULTS / study / "accuracy-summary.csv")
    ]
    report = (RESULTS / study / "accuracy.md").read_text(encoding="utf-8")
    said = findings([], rows, [])
    assert len(said) >= len({row["method"] for row in rows} - {UNPROTECTED})
    assert [note for note in said if f"- {note}\n" not in report] == []


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text
