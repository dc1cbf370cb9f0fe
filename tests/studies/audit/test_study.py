"""The whole command: controls, verdicts, report, exit code."""

import json
from pathlib import Path

import pytest

from obfuscatune.errors import UsageError
from obfuscatune.studies.audit.controls import canaries, control_profile, repeated_controls
from obfuscatune.studies.audit.fixtures import SETTINGS
from obfuscatune.studies.audit.runner import REPETITIONS, attack_profile, memory_gb, repeated_cells
from obfuscatune.studies.audit.study import failed_claims, make_plan, run
from obfuscatune.studies.audit.verdict import LEAK
from obfuscatune.studies.reproduce.cells import Cell

GOOD = {"model": "tiny", "profiles": ["strict"], "knowledge": ["N"], "attacks": [], "tokens": "d", "seeds": 1}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"model": "huge"}, "unknown model"),
        ({"architecture": "mamba"}, "unknown architecture"),
        ({"profiles": ["strictest"]}, "unknown profile"),
        ({"profiles": ["enclave"]}, "hands nothing over"),
        ({"knowledge": ["Z"]}, "unknown knowledge"),
        ({"attacks": ["A99"]}, "unknown attack"),
        ({"attacks": ["A7"]}, "attacks that need more knowledge: got A7, expected --knowledge with"),
        ({"attacks": ["A7", "A24"]}, "attacks that need more knowledge: got A7,"),
        ({"profiles": []}, "nothing to run"),
        ({"tokens": "d/7x"}, "token budget"),
    ],
)
def test_misuse_is_told(change: dict[str, object], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        make_plan(**{**GOOD, **change})  # type: ignore[arg-type]


def test_only_what_was_broken_is_run_again() -> None:
    plan = make_plan(**{**GOOD, "profiles": ["balanced", "strict"], "seeds": 2})  # type: ignore[arg-type]
    like = [
        Cell(label="", compute=attack_profile, inputs={"profile": profile, "seed": seed, "attacks": ["A14", "A24"]})
        for seed in plan.seeds
        for profile in plan.profiles
    ]
    again = repeated_cells(plan, like, [("strict", "A24")])
    assert len(again) == REPETITIONS * len(plan.seeds)
    assert {(cell.inputs["profile"], *cell.inputs["attacks"]) for cell in again} == {("strict", "A24")}
    assert len({(cell.inputs["seed"], cell.inputs["session"]) for cell in again}) == len(again)
    assert repeated_cells(plan, like, []) == []


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_no_two_seeds_are_scored_against_each_other(seeds: int) -> None:
    plan = make_plan(**{**GOOD, "seeds": seeds})  # type: ignore[arg-type]
    others = {seed: plan.other(seed) for seed in plan.seeds}
    assert all(other != seed and others.get(other) != seed for seed, other in others.items())


def test_only_negative_controls_that_failed_are_run_again() -> None:
    inputs = {"profile": "balanced", "seed": 0, "other": 1, "attacks": ["A11", "A24"]}
    like = [Cell(label="", compute=control_profile, inputs=inputs), Cell(label="", compute=canaries, inputs=inputs)]
    again = repeated_controls(like, ["A11"])
    assert [cell.inputs["session"] for cell in again] == list(range(1, 1 + REPETITIONS))
    assert all(cell.inputs["attacks"] == ["A11"] for cell in again)
    assert repeated_controls(like, []) == []


def test_cells_of_the_large_model_do_not_share_a_small_machine() -> None:
    plan = make_plan(**{**GOOD, "tokens": "d/4,100d"})  # type: ignore[arg-type]
    needed = {name: memory_gb(SETTINGS[name], [SETTINGS[name].width * 100]) for name in SETTINGS}
    assert memory_gb(SETTINGS["tiny"], plan.budgets) == needed["tiny"]
    assert needed["tiny"] < needed["small"] < 5 < 12 < needed["large"]


@pytest.mark.slow
def test_a_short_audit(trained: Path, tmp_path: Path) -> None:
    """In minutes, what the bars of a full run are about: `balanced` links at 4d tokens, `strict` does not."""
    plan = make_plan(
        model="tiny",
        profiles=["balanced", "strict"],
        knowledge=["N", "B", "Q"],
        attacks=["A1", "A3", "A7", "A12", "A24"],
        tokens="4d",
        seeds=2,
    )
    (tmp_path / "fixtures").symlink_to(trained)
    path, findings = run(plan, tmp_path, command=["audit"])
    assert findings.conclusive
    assert failed_claims(findings) == []
    linking = next(v for v in findings.verdicts if (v.profile, v.attack) == ("balanced", "A24"))
    assert linking.word == LEAK
    document = json.loads((tmp_path / "audit.json").read_text())
    assert len(document["verdicts"]) == 2 * len(plan.attacks)
    assert "| attack |" in path.read_text()
    assert {p.suffix for p in tmp_path.glob("audit*.*")} == {".md", ".csv", ".json", ".html", ".png", ".svg"}
