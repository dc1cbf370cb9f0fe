"""Local rows become the documents that the harness' templates read; what would leak or does not fit is refused."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from obfuscatune.errors import DataError, UsageError
from obfuscatune.studies.tasks.catalogue import (
    SPLITS_FILE,
    TASKS,
    check_tasks,
    local_dataset,
    packaged_configs,
    read_splits,
    require_harness,
    write_configs,
)

SCIQ = {"id": "s", "question": "colour?", "choices": ["red", "blue", "lime", "pink"], "answer": 1, "support": "Sky."}
PIQA = {"id": "p", "question": "open it", "choices": ["push", "pull"], "answer": 1}
OBQA = {"id": "o", "question": "ice is", "choices": ["hot", "cold", "loud"], "answer": 1}
WEBQS = {"id": "w", "question": "who?", "answers": ["Bo", "Al"]}
ROWS: dict[str, dict[str, Any]] = {"sciq": SCIQ, "piqa": PIQA, "openbookqa": OBQA, "webqs": WEBQS}
DOCUMENTS = {
    "sciq": {
        **{"question": "colour?", "distractor1": "red", "distractor2": "lime", "distractor3": "pink"},
        **{"correct_answer": "blue", "support": "Sky."},
    },
    "piqa": {"goal": "open it", "sol1": "push", "sol2": "pull", "label": 1},
    "openbookqa": {
        "question_stem": "ice is",
        "choices": {"text": ["hot", "cold", "loud"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    },
    "webqs": {"question": "who?", "answers": ["Bo", "Al"]},
}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write rows as a file of a task; returns the data directory."""

    def write(task: str, split: str, *rows: dict[str, Any]) -> Path:
        path = tmp_path / TASKS[task].folder / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path

    return write


@pytest.mark.parametrize("task", TASKS)
def test_rows_get_the_columns_of_the_harness(task: str, write: Write) -> None:
    row = ROWS[task]
    data = write(task, "validation", row)
    splits = read_splits(task, data)
    assert splits.training == []
    assert splits.held_out == [{"id": row["id"], **DOCUMENTS[task]}]
    write(task, "train", {**row, "id": "t"})
    assert [document["id"] for document in read_splits(task, data).training] == ["t"]


def test_a_test_file_goes_before_a_validation_file(write: Write) -> None:
    write("piqa", "validation", {**PIQA, "id": "v"})
    data = write("piqa", "test", {**PIQA, "id": "t"})
    dataset = local_dataset("piqa", str(data), pretrained="the model's arguments come along")
    assert [dataset[split]["id"] for split in ("validation", "test")] == [["t"], ["t"]]


def test_webqs_is_split_by_its_list(write: Write) -> None:
    data = write("webqs", "train", *({**WEBQS, "id": f"w{i}"} for i in range(4)))
    with pytest.raises(UsageError, match="no held-out rows of task webqs"):
        read_splits("webqs", data)
    names = {"w0": "trainmodel", "w1": "val", "w2": "devtest"}
    (data / "webqs" / SPLITS_FILE).write_text(json.dumps(names))
    with pytest.raises(DataError, match="rows are in no split: got 1 of 4"):
        read_splits("webqs", data)
    (data / "webqs" / SPLITS_FILE).write_text(json.dumps({**names, "w3": "trainmodel"}))
    splits = read_splits("webqs", data)
    assert [document["id"] for document in splits.training] == ["w0", "w3"]
    assert [document["id"] for document in splits.held_out] == ["w1", "w2"]
    for bad in ("[]", "{", ""):
        (data / "webqs" / SPLITS_FILE).write_text(bad)
        with pytest.raises(DataError, match="splits"):
            read_splits("webqs", data)


def test_held_out_rows_are_not_learnt(write: Write) -> None:
    write("sciq", "train", SCIQ, {**SCIQ, "id": "other"})
    data = write("sciq", "validation", SCIQ)
    with pytest.raises(DataError, match="rows to learn from are also held out: got 1 ids in both"):
        read_splits("sciq", data)


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        (
            "sciq",
            {"choices": ["Sesame", "b", "c"]},
            "'choices' does not fit the task: got 3 items, expected a list of 4",
        ),
        ("piqa", {"choices": ["Sesame", "b", "c"]}, "expected a list of 2"),
        ("openbookqa", {"choices": ["Sesame"]}, "expected a list of 2 to 26"),
        ("openbookqa", {"choices": "Sesame"}, "got str"),
        ("piqa", {"choices": ["Sesame", " "]}, "'choices' is empty"),
        ("piqa", {"answer": 2}, "'answer' names no choice"),
        ("piqa", {"answer": True}, "'answer' names no choice: got bool"),
        ("piqa", {"answer": "Sesame"}, "got str"),
        ("sciq", {"support": None}, "'support' has the wrong type"),
        ("sciq", {"question": 7}, "'question' has the wrong type"),
        ("piqa", {"Sesame": 1}, "row has the wrong keys"),
        ("webqs", {"answers": []}, "'answers' does not fit the task: got 0 items"),
        ("webqs", {"choices": ["Bo"]}, "row has the wrong keys"),
        ("piqa", {"id": "first"}, "id twice"),
    ],
)
def test_bad_rows_are_refused_with_their_place(task: str, change: dict[str, Any], message: str, write: Write) -> None:
    data = write(task, "validation", {**ROWS[task], "id": "first"}, {**ROWS[task], **change})
    with pytest.raises(DataError) as caught:
        read_splits(task, data)
    assert message in str(caught.value)
    assert "validation.jsonl:2" in str(caught.value)
    assert "Sesame" not in str(caught.value) or "Sesame" in change, "the row's text is in the message"


def test_unknown_tasks_and_missing_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_tasks(["sciq", "piqa", "sciq"]) == ["sciq", "piqa"]
    with pytest.raises(UsageError, match="unknown task: got 'obqa'"):
        check_tasks(["sciq", "obqa"])
    with pytest.raises(UsageError, match="no held-out rows"):
        read_splits("sciq", tmp_path)
    with pytest.raises(UsageError, match="no such data directory"), write_configs(["sciq"], tmp_path / "none"):
        pass
    require_harness()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install '\.\[eval\]'"):
        require_harness()


def test_the_configurations_hold_no_row_and_go_away(write: Write) -> None:
    data = write("sciq", "validation", SCIQ)
    with write_configs(["sciq"], data) as configs:
        [path] = configs.iterdir()
        text = path.read_text()
        assert str(packaged_configs()["sciq"]) in text
        assert "colour" not in text
    assert not configs.exists()


def test_the_real_rows_fit(shared: Path) -> None:
    counts = {
        task: tuple(map(len, (splits.training, splits.held_out)))
        for task in TASKS
        for splits in [read_splits(task, shared / "data")]
    }
    assert counts == {
        "webqs": (2834, 944),
        "openbookqa": (4957, 500),
        "piqa": (16113, 1838),
        "sciq": (11679, 1000),
    }
