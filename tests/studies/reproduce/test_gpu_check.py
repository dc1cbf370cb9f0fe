"""The check with the worker on a device: it passes on this one, fails where it must, and is skipped without a GPU."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from obfuscatune.studies.reports.tables import read_csv
from obfuscatune.studies.reproduce import equality, gpu_check
from obfuscatune.studies.reproduce.equality import (
    FAILED,
    GRADIENTS,
    LOGITS,
    LOSSES,
    NOT_JUDGED,
    OK,
    TOKENS,
    check,
    worst,
)
from obfuscatune.studies.reproduce.gpu_check import main, run

pytestmark = pytest.mark.slow


def test_without_a_gpu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--output_dir", str(tmp_path / "out")]) == 0
    assert "skipped" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("profile", ["balanced", "stream"])
def test_the_profile_passes(monkeypatch: pytest.MonkeyPatch, profile: str) -> None:
    monkeypatch.setattr(equality, "_ADAMW_STEPS", 2)
    monkeypatch.setattr(equality, "_NEW_TOKENS", 3)
    rows = list(check([profile], dtype="float32", device="cpu"))
    assert [row["quantity"] for row in rows] == [LOGITS, GRADIENTS, LOSSES, TOKENS]
    assert {row["verdict"] for row in rows} == {OK}


@pytest.mark.parametrize("quantity", ["logits", "gradients"])
def test_another_model_is_told(monkeypatch: pytest.MonkeyPatch, quantity: str) -> None:
    measure = getattr(equality, quantity)
    plain, other = equality._Plain("float32", "cpu"), equality._Exact()
    with plain.open() as model, other.open() as exact:
        truth = measure(other, exact)
        model.get_base_model().transformer.h[1].mlp.c_proj.weight.data.mul_(1.01)
        assert worst(measure(plain, model), truth) > 10 * equality.FLOOR["float32"]


def row(verdict: str) -> dict[str, Any]:
    return {"profile": "paper", "dtype": "float32", "quantity": LOGITS, "error": 1.0, "verdict": verdict}


@pytest.mark.parametrize(("verdict", "code"), [(OK, 0), (FAILED, 1)])
def test_a_failure_is_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verdict: str, code: int) -> None:
    monkeypatch.setattr(gpu_check, "check", lambda profiles, *, dtype, device: [row(verdict), row(NOT_JUDGED)])
    costs: list[dict[str, Any]] = []
    monkeypatch.setattr(gpu_check.cost, "run", lambda preset, path, **options: costs.append(options) or path)
    assert run(tmp_path, device="cpu") == code
    assert [cost["dtype"] for cost in costs] == ["float32", "bfloat16"]
    assert all(0 < cost["seconds"] <= gpu_check.SECONDS for cost in costs)
    assert [found["verdict"] for found in read_csv(tmp_path / "gpu-check.csv")] == [verdict, NOT_JUDGED] * 2
    told = (tmp_path / "gpu-check.md").read_text()
    assert "device: cpu" in told and f"{2 * code} of 2 comparisons failed, 2 are not judged" in told


def test_a_broken_yardstick_passes_nothing() -> None:
    assert equality._row(LOGITS, float("nan"), 0.1, 0.2, judged=True)["verdict"] == FAILED
    assert worst({"a": torch.ones(2)}, {"b": torch.ones(2)}) != worst({"a": torch.ones(2)}, {"a": torch.ones(2)})
    assert worst({"a": torch.tensor([1.0, 3.0])}, {"a": torch.tensor([1.0, 2.0])}) == 0.5
    equal, nan = torch.ones(2), torch.tensor([1.0, float("nan")])
    assert math.isnan(worst({"a": equal, "b": nan}, {"a": equal, "b": equal}))
