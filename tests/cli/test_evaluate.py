"""From a task's rows to an adapter to its results, on the command line; lm-eval's own command line beside it."""

import gc
import json
import stat
from pathlib import Path
from typing import Any

import pytest

from obfuscatune.errors import UsageError

from .conftest import Run

CHOICES = ("blue", "red", "old", "new")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """WebQuestions that are all answered alike, and SciQ rows; the names of the rows are no word of the output."""
    directory = tmp_path_factory.mktemp("tasks")
    for folder in ("webqs", "sciq"):
        (directory / folder).mkdir()
    for split, count in (("train", 24), ("validation", 6)):
        webqs = [{"id": f"{split}-{i}", "question": f"which {i}?", "answers": ["yes", "it is"]} for i in range(count)]
        sciq = [
            {"id": f"{split}-{i}", "question": f"{i}?", "choices": CHOICES, "answer": i % 4, "support": ""}
            for i in range(count)
        ]
        for folder, rows in (("webqs", webqs), ("sciq", sciq)):
            (directory / folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.fixture(scope="module")
def quiet() -> Any:
    """Keep the harness from adding a handler for standard error, which is closed after the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.utils.setup_logging", lambda: None)
        yield


def test_a_task_is_learnt_and_evaluated_without_a_script(
    run: Run, model_dir: Path, worker: str, data_dir: Path, tmp_path: Path
) -> None:
    model = ("--model_name_or_path", model_dir, "--worker", worker)
    adapter, before, after = tmp_path / "adapter", tmp_path / "before.json", tmp_path / "after.json"
    training = ("--learning_rate", 1e-2, "--max_steps", 150, "--lora_r", 8, "--warmup_steps", 5)
    outcome = run("finetune", *model, "--task", "webqs", "--data_dir", data_dir, "--output_dir", adapter, *training)
    assert outcome.code == 0, outcome.err
    assert "task webqs: 24 rows" in outcome.err

    evaluate = ("evaluate", *model, "--task", "webqs", "--task", "sciq", "--data_dir", data_dir)
    outcome = run(*evaluate, "--limit", 4, "--output_file", before)
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[0].split() == ["task", "metric", "value", "+-", "items"]
    assert [line.split()[:2] for line in outcome.out.splitlines()[1:]] == [
        ["webqs", "exact_match"],
        ["sciq", "acc"],
        ["sciq", "acc_norm"],
    ]
    outcome = run(*evaluate, "--adapter_name_or_path", adapter, "--output_file", after, "--per_item")
    assert outcome.code == 0, outcome.err
    assert stat.S_IMODE(after.stat().st_mode) == 0o600
    for text in (outcome.out, outcome.err, after.read_text()):
        assert "which" not in text, "the results hold rows"

    plain, adapted = (json.loads(path.read_text()) for path in (before, after))
    assert (plain["limit"], plain["tasks"]["webqs"]["items"], plain["adapter"]) == (4, 4, None)
    assert "predictions" not in plain["tasks"]["webqs"]
    assert {"commit", "dirty", "cpu", "torch", "peft", "date"} <= plain["provenance"].keys()
    assert plain["tasks"]["webqs"]["metrics"] == {"exact_match": 0.0}
    assert adapted["tasks"]["webqs"]["metrics"] == {"exact_match": 1.0}
    # The harness asks for its accepted answers in their order: "it is", "yes".
    predictions = adapted["tasks"]["webqs"]["predictions"]
    assert [item["id"] for item in predictions] == [f"validation-{i}" for i in range(6)]
    assert all((item["choice"], item["greedy"]) == (1, [1]) for item in predictions)
    names = {"id", "choice", "choice_norm", "greedy", "answers", "likelihoods"}
    assert all(item.keys() == names and len(item["likelihoods"]) == 2 for item in predictions)


@pytest.mark.slow
@pytest.mark.usefixtures("quiet")
def test_the_harness_own_command_line_gives_what_hf_gives(
    run: Run, model_dir: Path, worker: str, data_dir: Path, tmp_path: Path
) -> None:
    from lm_eval.models.huggingface import HFLM

    from obfuscatune.studies.tasks.harness import evaluate

    tasks = ["sciq", "webqs"]
    given = ("--model_args", f"pretrained={model_dir},worker={worker}", "--tasks", ",".join(tasks), "--limit", 5)
    written = ("--output_path", tmp_path, "--log_samples")
    outcome = run("lm-eval", *given, "--data_dir", data_dir, *written)
    gc.collect()  # the harness's command line leaves its model, and with it the worker's session, to the collector
    assert outcome.code == 0, outcome.err
    assert "|exact_match|" in outcome.out
    [results] = tmp_path.rglob("results_*.json")
    found = json.loads(results.read_text())
    assert found["config"]["profile"] == "balanced"
    expected = evaluate(HFLM(str(model_dir), device="cpu"), tasks, data_dir=data_dir, limit=5)
    for task in tasks:
        metrics = found["results"][task]
        assert {name: metrics[f"{name},none"] for name in expected[task].metrics} == expected[task].metrics
        [samples] = tmp_path.rglob(f"samples_{task}_*.jsonl")
        rows = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda row: row["doc_id"])
        likelihoods = [[float(likelihood) for likelihood, _ in row["filtered_resps"]] for row in rows]
        chosen = [(row["doc"]["id"], of.index(max(of))) for row, of in zip(rows, likelihoods, strict=True)]
        assert chosen == [(item.id, item.choice) for item in expected[task].predictions]


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data_dir", "none", "--tasks", "sciq"], "no such data directory"),
        (["--data_dir", ".", "--tasks", "sciq", "--include_path", "x"], "two sources of tasks"),
        (["--data_dir", ".", "--tasks", "sciq", "--cache_requests"], "cache of requests knows no local rows"),
        (["--model_args", "pretrained=x"], "no task"),
        (["--tasks", "sciq"], "no model"),
        (["--tasks", "sciq", "--model_args", "pretrained=x", "--log_samples"], "the harness refuses the options"),
        (
            ["--tasks", "sciq", "--num_fewshot", "25", "--model_args", "pretrained=x", "--data_dir", "DATA"],
            "too few examples",
        ),
        (["--tasks", "webqs", "--num_fewshot", "1", "--model_args", "pretrained=x"], "webqs has no few-shot prompt"),
        (["--tasks", "sciq", "--model_args", "pretrained=x,device=cpu"], "device in --model_args, expected --device"),
        (["--tasks", "sciq", "--model_args", "pretrained=x,batch_size=2"], "expected --batch_size"),
    ],
)
def test_what_lm_eval_cannot_do_is_one_line(run: Run, data_dir: Path, arguments: list[str], message: str) -> None:
    outcome = run("lm-eval", *(str(data_dir) if word == "DATA" else word for word in arguments))
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err and "Traceback" not in outcome.err


@pytest.mark.slow
@pytest.mark.usefixtures("quiet")
def test_a_task_that_the_harness_has_not_is_one_line(run: Run) -> None:  # which takes it half a minute to find out
    outcome = run("lm-eval", "--model_args", "pretrained=x", "--tasks", "sciq,nosuch")
    assert (outcome.code, outcome.out) == (2, "")
    assert "error: no such task: got nosuch (at --tasks)" in outcome.err


def test_bad_options_write_nothing(run: Run, model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    evaluate = ("evaluate", "--model_name_or_path", model_dir, "--data_dir", data_dir)
    existing = tmp_path / "results.json"
    existing.write_text("kept")
    for arguments, message in (
        (("--task", "hellaswag"), "unknown task"),
        (("--task", "sciq", "--per_item"), "nowhere to write the items"),
        (("--task", "sciq", "--num_fewshot", 25), "too few examples for the prompt: got 24 training rows of sciq"),
        (("--task", "sciq", "--output_file", existing), "file is there already"),
        (("--task", "sciq", "--output_file", tmp_path / "no" / "file"), "no such directory"),
    ):
        outcome = run(*evaluate, *arguments)
        assert (outcome.code, outcome.out) == (2, "")
        assert message in outcome.err
    assert existing.read_text() == "kept"

    for missing, message in (
        (tmp_path / "none", "no such data directory"),
        (data_dir, "no held-out rows of task piqa"),
    ):
        # No such model either: the data is looked at first, before a model is loaded for minutes.
        outcome = run("evaluate", "--model_name_or_path", tmp_path / "x", "--task", "piqa", "--data_dir", missing)
        assert (outcome.code, outcome.out) == (2, "")
        assert message in outcome.err

    finetune = ("finetune", "--model_name_or_path", model_dir, "--output_dir", tmp_path / "out")
    for arguments, message in (
        ((), "no training rows"),
        (("--task", "sciq", "--train_file", "x"), "two sources of training rows"),
        (("--train_file", "x", "--data_dir", data_dir), "a data directory without a task"),
        (("--train_file", "x", "--allow_changed", "seed"), "changes to a run that is not resumed"),
    ):
        outcome = run(*finetune, *arguments)
        assert outcome.code == 2
        assert message in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_missing_harness_says_how_to_get_it(run: Run, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise UsageError("lm-evaluation-harness is not installed", hint="pip install '.[eval]'")

    monkeypatch.setattr("obfuscatune.studies.tasks.catalogue.require_harness", missing)
    for arguments in (
        ("evaluate", "--model_name_or_path", model_dir, "--task", "sciq"),
        ("lm-eval", "--tasks", "sciq"),
    ):
        outcome = run(*arguments)
        assert outcome.code == 2
        assert "hint: pip install '.[eval]'" in outcome.err
