"""A resumed run is the run that it resumes: what differs is refused by name, and what is damaged by file."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from obfuscatune.training.checkpoints import checkpoints


@pytest.fixture(scope="module")
def options(model_dir: Path, train_file: Path) -> list[object]:
    return [
        *("finetune", "--model_name_or_path", model_dir, "--train_file", train_file, "--profile", "enclave"),
        *("--max_steps", 4, "--save_steps", 2, "--lora_r", 2, "--lora_dropout", 0.1),
    ]


@pytest.fixture(scope="module")
def checkpoint(options: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from obfuscatune.cli import main

    output = tmp_path_factory.mktemp("run") / "out"
    assert main([str(option) for option in [*options, "--output_dir", output]]) == 0
    return output / "checkpoint-2"


@pytest.fixture
def resume(options: list[object], checkpoint: Path, tmp_path: Path) -> list[object]:
    """The command that goes on from a copy of the checkpoint, ``out/checkpoint-2``."""
    shutil.copytree(checkpoint, tmp_path / "out" / checkpoint.name)
    return [*options, "--output_dir", tmp_path / "out", "--resume_from_checkpoint", "last"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("learning_rate", 1e-5), ("weight_decay", 0.5), ("lora_alpha", 64), ("lora_r", 4), ("optim", "sgd")),
        *(("lora_target_modules", "c_attn"), ("dtype", "float64"), ("warmup_steps", 1)),
        *(("seed", 7), ("max_length", 12), ("per_device_train_batch_size", 2), ("lora_dropout", 0.0)),
    ],
)
def test_another_setting_is_refused_by_its_name(name: str, value: object, resume: list[object], run) -> None:
    outcome = run(*resume, f"--{name}", value)
    assert outcome.code == 2
    assert f"the checkpoint is of another run: got {name}=" in outcome.err
    free = name in ("seed", "max_length", "per_device_train_batch_size", "lora_dropout")
    assert (f"--allow_changed {name}" if free else f"another {name} needs a new run") in outcome.err


def test_other_rows_and_another_model_are_refused(resume: list[object], model_dir: Path, tmp_path: Path, run) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "zebra"}\n' * 24)
    outcome = run(*resume, "--train_file", rows)
    assert outcome.code == 2 and "another run: got data=" in outcome.err and "zebra" not in outcome.err

    from transformers import GPT2LMHeadModel

    other = shutil.copytree(model_dir, tmp_path / "other")
    model = GPT2LMHeadModel.from_pretrained(other)
    model.transformer.ln_f.bias.data += 1
    model.save_pretrained(other)
    outcome = run(*resume, "--model_name_or_path", other)
    assert outcome.code == 2 and "another model needs a new run" in outcome.err


def test_what_is_allowed_by_name_may_differ(resume: list[object], tmp_path: Path, run) -> None:
    outcome = run(*resume, "--max_steps", 6, "--allow_changed", "max_steps", "--logging_steps", 1)
    assert outcome.code == 0, outcome.err
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    outcome = run(*resume, "--allow_changed", "learning_rate")
    assert outcome.code == 2 and "cannot be changed in a resumed run: got learning_rate" in outcome.err


def test_how_often_a_resumed_run_saves_and_logs_is_its_own(
    resume: list[object], tmp_path: Path, run, caplog: pytest.LogCaptureFixture
) -> None:
    monitored = logging.getLogger("transformers.trainer_utils")
    monitored.addHandler(caplog.handler)
    try:
        outcome = run(*resume, "--save_steps", 1, "--logging_steps", 1)
    finally:
        monitored.removeHandler(caplog.handler)
    assert outcome.code == 0, outcome.err
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [entry["step"] for entry in report["training"] if "loss" in entry] == [3, 4]
    assert "do not match" not in caplog.text + outcome.err  # they differ on purpose


def test_a_run_that_goes_on_after_an_epoch_makes_up_for_its_evaluation(
    options: list[object], train_file: Path, tmp_path: Path, run
) -> None:
    """An epoch's last step is saved before the evaluation, which draws random numbers and moves this schedule."""
    schedule = ("--lr_scheduler_type", "reduce_lr_on_plateau")
    options = [*options, "--max_steps", 6, "--save_steps", 3, "--validation_file", train_file, *schedule]
    whole = tmp_path / "whole"
    assert run(*options, "--output_dir", whole).code == 0

    def state_of(output: Path) -> tuple[bytes, object, list[tuple[int, float]]]:
        entries = json.loads((output / "report.json").read_text())["training"]
        losses = [(entry["step"], entry["eval_loss"]) for entry in entries if "eval_loss" in entry]
        schedule = torch.load(output / "checkpoint-6" / "scheduler.pt")
        return (output / "adapter_model.safetensors").read_bytes(), schedule, losses

    expected = state_of(whole)
    assert [step for step, _ in expected[2]] == [3, 6]
    resumed = tmp_path / "resumed"
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    outcome = run(*options, "--output_dir", resumed, "--resume_from_checkpoint", "last")
    assert outcome.code == 0, outcome.err
    assert state_of(resumed) == expected
    # Complete, but for the last one.
    assert run(*options, "--output_dir", whole, "--resume_from_checkpoint", "last").code == 0
    assert state_of(whole) == expected


def test_a_run_that_is_complete_is_not_trained_any_further(
    options: list[object], train_file: Path, tmp_path: Path, run
) -> None:
    # Its last step is in the middle of an epoch, and a constant rate would show one step more.
    output = tmp_path / "out"
    options = [*options, "--lr_scheduler_type", "constant", "--output_dir", output]
    assert run(*options).code == 0
    adapter = (output / "adapter_model.safetensors").read_bytes()
    (output / "adapter_model.safetensors").unlink()  # as where the disk was full
    outcome = run(*options, "--resume_from_checkpoint", "last")
    assert outcome.code == 0, outcome.err
    assert (output / "adapter_model.safetensors").read_bytes() == adapter
    assert checkpoints(output)[-1].name == "checkpoint-4"
    assert "train_loss" not in (output / "report.json").read_text()


def test_a_checkpoint_with_more_steps_than_are_asked_for_is_no_success(
    resume: list[object], tmp_path: Path, run
) -> None:
    outcome = run(*resume, "--max_steps", 1, "--allow_changed", "max_steps")
    assert outcome.code == 2 and "more steps than are asked for: got 2, expected at most 1" in outcome.err
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_run_elsewhere_is_not_overwritten_by_one_that_resumes(
    resume: list[object], checkpoint: Path, tmp_path: Path, run
) -> None:
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other / "checkpoint-9")  # stands for a longer run of other settings
    (other / "adapter_config.json").write_text("{}")
    resume = [*resume, "--output_dir", other, "--resume_from_checkpoint", tmp_path / "out" / "checkpoint-2"]
    outcome = run(*resume)
    assert outcome.code == 2 and "output directory is not empty" in outcome.err
    outcome = run(*resume, "--overwrite_output_dir")
    assert outcome.code == 0, outcome.err
    assert [path.name for path in checkpoints(other)] == ["checkpoint-4"]  # "last" finds no other run's


def test_a_link_to_a_checkpoint_is_one_and_goes_without_what_it_leads_to(
    resume: list[object], checkpoint: Path, tmp_path: Path, run
) -> None:
    output = tmp_path / "out"
    shutil.rmtree(output / "checkpoint-2")
    for at in (output / "checkpoint-2", tmp_path / "checkpoint-3"):
        at.symlink_to(checkpoint)
    (output / "checkpoint-1").write_text("mine")
    outcome = run(*resume, "--save_total_limit", 1)
    assert outcome.code == 0, outcome.err
    assert [path.name for path in checkpoints(output)] == ["checkpoint-4"]
    assert (checkpoint / "master_secret").exists()

    (output / "checkpoint-7").symlink_to(checkpoint)
    (output / "checkpoint-8").symlink_to(tmp_path / "nowhere")
    outcome = run(*resume, "--resume_from_checkpoint", tmp_path / "checkpoint-3", "--overwrite_output_dir")
    assert outcome.code == 0, outcome.err
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-4"]
    assert (checkpoint / "master_secret").exists() and (output / "checkpoint-1").read_text() == "mine"


def test_an_older_checkpoint_that_cannot_be_removed_ends_no_run(
    resume: list[object], tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    rmtree = shutil.rmtree

    def refuse(path: Path, *arguments: object, **named: object) -> None:
        if Path(path).name.startswith("checkpoint-"):
            raise PermissionError(13, "Permission denied", str(path))
        rmtree(path, *arguments, **named)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    old = tmp_path / "out" / "checkpoint-2"
    outcome = run(*resume, "--save_total_limit", 1)
    assert outcome.code == 0, outcome.err
    assert f"warning: cannot remove a checkpoint: got Permission denied (at {old})" in outcome.err
    outcome = run(
        *[word for word in resume if word not in ("--resume_from_checkpoint", "last")], "--overwrite_output_dir"
    )
    assert outcome.code == 1 and f"cannot remove a checkpoint: got Permission denied (at {old})" in outcome.err


def test_every_file_of_a_checkpoint_is_checked(resume: list[object], tmp_path: Path, run) -> None:
    directory = tmp_path / "out" / "checkpoint-2"
    names = {path.name for path in directory.iterdir()} - {"obfuscatune.json"}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "master_secret"} < names
    for name in sorted(names):
        content = (directory / name).read_bytes()
        for damaged, message in ((content[: len(content) // 2], "is damaged"), (None, "is missing")):
            (directory / name).unlink()
            if damaged is not None:
                (directory / name).write_bytes(damaged)
            outcome = run(*resume)
            assert outcome.code == 2 and f"a file of the checkpoint {message}: got {name}" in outcome.err
            (directory / name).write_bytes(content)
    (directory / "pytorch_model.bin").write_bytes(b"")
    shutil.copytree(directory, directory / "default")  # the Trainer would load the adapter that is in it
    outcome = run(*resume)
    assert outcome.code == 2 and "is none of its own: got default, pytorch_model.bin" in outcome.err
    (directory / "obfuscatune.json").write_text("[" * 100_000)
    outcome = run(*resume)
    assert outcome.code == 2 and "the checkpoint does not say what it is" in outcome.err
