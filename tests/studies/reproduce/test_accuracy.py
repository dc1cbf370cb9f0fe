"""The accuracy study end to end on the bundled model, with a few steps a cell."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from obfuscatune.errors import ObfuscatuneError, UsageError
from obfuscatune.studies.bundled import model_directory
from obfuscatune.studies.reports.tables import read_csv
from obfuscatune.studies.reproduce import accuracy
from obfuscatune.studies.reproduce.accuracy_rows import cell_row, score
from obfuscatune.studies.reproduce.presets import PRESETS, RECORDS, UNPROTECTED, choose
from obfuscatune.studies.reproduce.trial import Trial, run_trial

pytestmark = pytest.mark.slow

# Of a log-likelihood after a few steps, in nats: 5e-6 measured between unprotected and balanced, 7 under naive.
LIKELIHOOD_TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def presets() -> Any:
    """The tiny preset with six steps; the model's own dropout is off in it."""
    tiny = PRESETS["tiny"]
    tasks = {RECORDS: {**tiny.task_training[RECORDS], "max_steps": 6}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "obfuscatune.studies.reproduce.presets.PRESETS", {"tiny": dataclasses.replace(tiny, task_training=tasks)}
        )
        yield


@pytest.fixture(scope="module")
def results(presets: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("results")
    methods = (UNPROTECTED, "naive", "balanced")
    accuracy.run("tiny", directory, methods=methods, workers=1, command=["reproduce", "accuracy"])
    return directory


def test_balanced_predicts_what_local_training_predicts(results: Path) -> None:
    cells = {row["method"]: row for row in read_csv(results / "accuracy.csv")}
    for name in ("choices", "choices_norm", "right", "value"):
        assert cells["balanced"][name] == cells[UNPROTECTED][name]
    paired = {row["method"]: row for row in read_csv(results / "accuracy-paired.csv")}
    assert (paired["balanced"]["differ"], paired["balanced"]["p"]) == ("0", "1.0")
    assert float(paired["balanced"]["likelihood"]) < LIKELIHOOD_TOLERANCE
    assert float(paired["naive"]["likelihood"]) > 1000 * LIKELIHOOD_TOLERANCE, "the comparison sees no difference"


def test_the_report_is_whole_and_fetches_nothing(results: Path) -> None:
    text = (results / "accuracy.md").read_text()
    assert "0 of 16 predictions differ" in text
    assert "command: obfuscatune reproduce accuracy\n" in text
    assert str(results) not in text
    page = (results / "accuracy.html").read_text()
    assert "<svg" in page and not re.search(r"(src|href)=\"https?:|@import", page)
    assert (results / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert (results / "accuracy.svg").read_text().rstrip().endswith("</svg>")
    [table] = [line for line in text.splitlines() if line.startswith("| bundled | records | float32 | acc | 1 | 16 ")]
    assert len(re.findall(r" \d+\.\d ", table)) == 3 and "±" not in table  # of one seed


def test_nothing_is_computed_twice(results: Path, presets: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("computed again")

    before = (results / "accuracy.csv").read_bytes()
    planned = accuracy.plan(choose("tiny", methods=("balanced",)), results, None, "cpu")
    assert planned
    for _, cell in planned:
        assert (results / "cells" / f"{cell.key}.json").is_file()
    monkeypatch.setattr("obfuscatune.studies.reproduce.accuracy.run_trial", fail)
    accuracy.run("tiny", results, methods=(UNPROTECTED, "naive", "balanced"), workers=1, command=[])
    assert (results / "accuracy.csv").read_bytes() == before


def test_a_row_of_the_table_re_derives_its_cell(results: Path, tmp_path: Path) -> None:
    row = read_csv(results / "accuracy.csv")[0]
    trial = Trial.from_dict(json.loads(row["trial"]))
    value = run_trial(trial, str(model_directory()), str(accuracy.write_records(tmp_path)))
    what = {name: row[name] for name in ("model", "task", "dtype", "method", "seed", "digests")}
    again = cell_row({**what, **value, "trial": trial.to_dict()})
    for name in ("choices", "choices_norm", "right", "items", "steps", "trial"):
        assert str(again[name]) == row[name]
    assert again["last_loss"] == float(row["last_loss"])


def test_a_cell_is_of_its_data_its_model_and_its_profile(presets: None, tmp_path: Path) -> None:
    def keys(directory: Path, **options: Any) -> set[str]:
        return {cell.key for _, cell in accuracy.plan(choose("tiny", **options), directory, None, "cpu")}

    base = keys(tmp_path)
    assert len(base) == 4 and keys(tmp_path / "elsewhere") == base
    for options in ({"seeds": (1,)}, {"dtypes": ("bfloat16",)}, {"methods": ("balanced+mlp=enclave",)}):
        assert not keys(tmp_path, **options) & base
    rows = tmp_path / "rows" / "sciq"
    rows.mkdir(parents=True)
    digests = []
    for text in ("a", "b"):
        (rows / "train.jsonl").write_text(text)
        digests.append(accuracy.digest_data("sciq", rows.parent, {}))
    assert digests[0] != digests[1]
    with pytest.raises(UsageError, match="no data of the task"):
        accuracy.digest_data("piqa", rows.parent, {})


def test_dropout_that_keyed_values_cannot_have_is_named(tmp_path: Path) -> None:
    preset = PRESETS["tiny"]
    training = dataclasses.replace(preset.training_of(RECORDS, 0), lora_dropout=0.05, max_steps=1, logging_steps=100)
    trial = Trial(
        **{"task": "sciq", "method": "paper", "dtype": "float32", "training": training, "train_rows": 16},
        **{"eval_items": 2, "eval_batch_size": 8, "no_dropout": False, "threads": 1},
    )
    value = run_trial(trial, str(model_directory()), str(accuracy.write_records(tmp_path)))
    assert value["switched_off"] == ["lora_dropout"]
    assert len(value["items"]) == 2
    assert len(value["losses"]) == value["steps"] == 1  # that it ended before the first log leaves a loss all the same


def test_items_that_do_not_add_up_are_refused() -> None:
    item = {"id": "a", "choice": 0, "choice_norm": 0, "greedy": [], "answers": [0], "likelihoods": [-1.0, -2.0]}
    what = {"model": "m", "task": "t", "method": "x", "seed": 0}
    assert score({**what, "metrics": {"acc": 1.0}, "items": [item]}) == 100
    with pytest.raises(ObfuscatuneError, match="do not add up"):
        score({**what, "metrics": {"acc": 0.5}, "items": [item]})
