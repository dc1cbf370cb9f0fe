"""The committed tables can be re-derived: the cheapest cell, computed again, predicts every item as it is written."""

import json
from pathlib import Path

import pytest

from obfuscatune.studies.bundled import model_directory
from obfuscatune.studies.reports.tables import read_csv
from obfuscatune.studies.reproduce.accuracy import digest_data, digest_model, write_records
from obfuscatune.studies.reproduce.accuracy_rows import cell_row
from obfuscatune.studies.reproduce.presets import RECORDS, UNPROTECTED
from obfuscatune.studies.reproduce.trial import Trial, run_trial
from obfuscatune.studies.tasks.catalogue import TASKS
from obfuscatune.training.loading import load_config

RESULTS = Path(__file__).parents[3] / "docs" / "results"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("table", "method"), [("accuracy", UNPROTECTED), ("accuracy", "balanced"), ("accuracy-shared", "shared")]
)
@pytest.mark.filterwarnings("ignore:.*on one machine.*")
def test_the_cheapest_committed_cell_is_re_derived(table: str, method: str, shared: Path, tmp_path: Path) -> None:
    # bfloat16 has three digits: there fresh keys may turn an item, and nothing is wrong.
    rows = [
        row
        for row in read_csv(RESULTS / table / "accuracy.csv")
        if row["method"] == method and row["dtype"] == "float32"
    ]
    row = min(rows, key=lambda row: float(row["train_seconds"]) + float(row["eval_seconds"]))
    trial = Trial.from_dict(json.loads(row["trial"]))
    wanted_model, wanted_data = row["digests"].split()

    models = [model_directory(), *(path for path in (shared / "models").glob("*") if path.is_dir())]
    found = [str(path) for path in models if digest_model(str(path), load_config(str(path))) == wanted_model]
    if not found:
        pytest.skip("the model of the committed table is not here")
    data = write_records(tmp_path) if row["task"] == RECORDS else shared / "data"
    if not (data / TASKS[trial.task].folder).is_dir() or digest_data(trial.task, data, {}) != wanted_data:
        pytest.skip("the data of the committed table are not in the folder 'shared'")

    value = run_trial(trial, found[0], str(data))
    what = {name: row[name] for name in ("model", "task", "dtype", "method", "seed", "digests")}
    again = cell_row({**what, **value, "trial": trial.to_dict()})
    for name in ("choices", "choices_norm", "right", "items", "value"):
        assert str(again[name]) == row[name], name
