"""`reproduce conditioning`: the sweep of the issue, tables of every measurement, cells that are computed once."""

import gzip
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from obfuscatune.errors import UsageError
from obfuscatune.studies.bundled import model_directory
from obfuscatune.studies.reports.tables import read_csv
from obfuscatune.studies.reproduce import conditioning, conditioning_cells
from obfuscatune.studies.reproduce.conditioning import PRESETS, Preset, run
from obfuscatune.studies.reproduce.conditioning_report import findings
from obfuscatune.studies.reproduce.fidelity import compare, read_text, text_windows
from obfuscatune.studies.reproduce.lesson import Lesson
from obfuscatune.training.loading import load_config, load_model, load_tokenizer

pytestmark = pytest.mark.slow

NAME = str(model_directory())
LEAST = Preset(
    keys=("none", "gaussian"),
    lessons=(("none", "worker"), ("gaussian", "worker"), ("gaussian", "enclave")),
    checked=("gaussian",),
    gaussian_draws=1,
    windows=1,
    window_tokens=16,
    width=16,
    rows=8,
    lesson=Lesson(steps=1, facts=16, batch_size=2),
)


def test_the_sweep_is_that_of_the_study() -> None:
    for preset in ("small", "paper"):
        assert PRESETS[preset].keys == ("none", "1", "2", "8", "32", "128", "160", "1024", "gaussian")


def test_all_measurements_are_written_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(conditioning.PRESETS, "tiny", LEAST)
    path = run("tiny", tmp_path, command=["reproduce", "conditioning"])
    inference = read_csv(tmp_path / "conditioning-inference.csv")
    assert {(row["keys"], row["dtype"]) for row in inference} == {
        (keys, dtype) for keys in LEAST.keys for dtype in ("float32", "bfloat16", "float16")
    }
    training = read_csv(tmp_path / "conditioning-training.csv")
    assert len(training) == len(LEAST.lessons) * 3
    assert [row["keys"] for row in read_csv(tmp_path / "conditioning-layer.csv")] == ["none", "gaussian", "uniform"]
    checks = read_csv(tmp_path / "conditioning-processes.csv")
    assert [row["dtype"] for row in checks] == ["float32", "bfloat16"]
    for row in checks:  # other draws of Gaussian keys, whose condition numbers differ by more than ten now and then
        assert 1e-2 < float(row["ratio"]) < 1e2
    text = path.read_text()
    assert "obfuscatune reproduce conditioning" in text
    assert "| gaussian | bfloat16 | same |" in text
    for name in ("conditioning.png", "conditioning.svg", "conditioning.html"):
        assert (tmp_path / name).stat().st_size > 0

    cells = {cell: cell.stat().st_mtime_ns for cell in (tmp_path / "cells").iterdir()}
    run("tiny", tmp_path, command=["reproduce", "conditioning"])
    assert {cell: cell.stat().st_mtime_ns for cell in (tmp_path / "cells").iterdir()} == cells


def test_a_cell_computed_again_is_the_same() -> None:
    inputs = {"keys": "160", "dtype": "bfloat16", "seed": 0, "device": "cpu", "lora": "worker"}
    inputs |= {"lesson": {"steps": 2, "facts": 16, "batch_size": 2}}
    places = {"model": NAME, "text_file": None}
    assert conditioning_cells.lesson(inputs, places) == conditioning_cells.lesson(inputs, places)
    layer = {"keys": "160", "width": 16, "rows": 4, "seed": 0}
    assert conditioning_cells.layer(layer, {}) == conditioning_cells.layer(layer, {})


def row(dtype: str, keys: str, **values: Any) -> dict[str, Any]:
    common = {"dtype": dtype, "keys": keys, "key precision": "float32", "logits error": 1e-6}
    return {**common, "top-1": 1.0, "accuracy": 1.0, **values}


def test_no_loss_is_said_only_where_there_is_none() -> None:
    kept = [row("float32", "none"), row("float32", "1024", **{"logits error": 1e-5})]
    assert "no loss in inference" in findings(kept, [], [])[0]
    for lost in ({"top-1": 0.9}, {"accuracy": 0.9}):
        said = findings([row("float32", "none"), row("float32", "1024", **{"logits error": 1e-5}, **lost)], [], [])[0]
        assert "no loss" not in said
        assert "0.900" in said
    broken = {"logits error": math.nan, "top-1": 0.0, "accuracy": 0.25}
    said = findings([*kept, row("float32", "gaussian", **broken), kept[1]], [], [])[0]
    assert "to nan (keys: gaussian)" in said and "to 0.250" in said


def test_a_model_compared_with_itself_and_with_a_broken_one() -> None:
    model = load_model(NAME, "float64").eval()
    windows = torch.arange(2, 18)[None]
    same = compare(model, model, windows)
    assert (same.error, same.largest, same.top1, same.finite) == (0.0, 0.0, 1.0, True)
    assert same.perplexity == same.reference_perplexity > 1
    broken = load_model(NAME, "float64").eval()
    broken.transformer.ln_f.bias.data.fill_(math.nan)
    found = compare(broken, model, windows)
    assert not found.finite
    assert math.isnan(found.error)


def test_texts_are_read_plain_and_packed(tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.txt", tmp_path / "a.txt.gz"
    plain.write_text("one two three " * 40)
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_text(plain) == read_text(packed)
    tokenizer = load_tokenizer(NAME, load_config(NAME))
    assert text_windows(read_text(plain), tokenizer, windows=3, length=8).shape == (3, 8)
    assert text_windows(read_text(None), tokenizer, windows=16, length=256).shape == (16, 256)
    with pytest.raises(UsageError, match="too short: got"):
        text_windows("one", tokenizer, windows=3, length=8)


def test_bad_texts_and_presets_are_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_text(bad)
    with pytest.raises(UsageError, match="cannot read the text"):
        read_text(tmp_path / "missing")
    (tmp_path / "no.gz").write_text("not packed")
    with pytest.raises(UsageError, match="cannot read the text"):
        read_text(tmp_path / "no.gz")
    with pytest.raises(UsageError, match="unknown preset: got huge"):
        run("huge", tmp_path)
