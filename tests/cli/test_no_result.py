"""What is no result is no success: models, tokenizers and runs that end before they give one; in enclaves' jobs too."""

import json
import math
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerControl, TrainerState

from obfuscatune.training.interrupt import StopOnSignal
from obfuscatune.training.trainer import ProtectedTrainer

Tensors = dict[str, torch.Tensor]
FC = "transformer.h.1.mlp.c_fc.weight"


@pytest.fixture
def inside(finetune: list[object], tmp_path: Path) -> list[object]:
    """A fine-tuning of three steps in the enclave, into ``out``."""
    steps = ("--max_steps", 3, "--save_steps", 2)
    return [*finetune[:5], *finetune[7:], *steps, "--profile", "enclave", "--output_dir", tmp_path / "out"]


@pytest.fixture
def changed(model_dir: Path, tmp_path: Path) -> Callable[[Callable[[Tensors], object]], Path]:
    """Make a copy of the model whose tensors a function has changed."""

    def change(function: Callable[[Tensors], object]) -> Path:
        directory = shutil.copytree(model_dir, tmp_path / "changed")
        path = directory / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        function(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
        return directory

    return change


def without_tokenizer(directory: Path) -> None:
    for path in [*directory.glob("tokenizer*"), *directory.glob("special*")]:
        path.unlink()


BROKEN: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "missing": (lambda tensors: tensors.pop(FC), f"a tensor of the model is missing: expected {FC}"),
    "unexpected": (lambda tensors: tensors.update(more=torch.ones(2)), "tensors that are not of this model: got more"),
    "large": (lambda tensors: tensors[FC].fill_(math.nan), f"a weight is not finite (at {FC})"),
    "small": (
        lambda tensors: tensors["transformer.ln_f.bias"].fill_(math.inf),
        "a weight is not finite (at transformer.ln_f.bias)",
    ),
    "tokenizer": (lambda tensors: None, "no tokenizer: got 1 tokens"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_model_is_neither_trained_nor_sealed(how: str, inside, changed, tmp_path: Path, run) -> None:
    change, message = BROKEN[how]
    directory = changed(change)
    if how == "tokenizer":
        without_tokenizer(directory)
    outcome = run(*inside, "--model_name_or_path", directory)
    assert (outcome.code, outcome.out) == (2, "") and message in outcome.err
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    if how in ("large", "tokenizer"):
        assert run("identity", "new", "lab", "--output_dir", tmp_path, "--suite", "x25519").code == 0
        keys = ("--identity", tmp_path / "lab.key", "--recipient", tmp_path / "lab.pub")
        outcome = run("seal", "model", directory, *keys, "--output", tmp_path / "model.sealed")
        assert outcome.code == 2 and message in outcome.err
        assert not (tmp_path / "model.sealed").exists()


@pytest.mark.parametrize("more", [(), ("--max_grad_norm", 0), ("--gradient_accumulation_steps", 2)])
def test_a_diverged_run_gives_no_adapter(more: tuple[object, ...], inside, tmp_path: Path, run) -> None:
    outcome = run(*inside, "--learning_rate", 1e30, "--warmup_steps", 0, *more)
    assert outcome.code == 1
    assert "is not finite (at step 2)\nhint: the run diverged" in outcome.err
    assert list((tmp_path / "out").iterdir()) == []


def test_an_adapter_that_is_not_finite_is_not_saved(inside, tmp_path: Path, run, monkeypatch) -> None:
    """The last step has no loss after it."""
    train = ProtectedTrainer.train

    def spoilt(self: ProtectedTrainer, *arguments: Any, **named: Any) -> Any:
        trained = train(self, *arguments, **named)
        next(p for p in self.model.parameters() if p.requires_grad).data[0, 0] = math.nan
        return trained

    monkeypatch.setattr(ProtectedTrainer, "train", spoilt)
    outcome = run(*inside)
    assert outcome.code == 1 and "the adapter is not finite, and is not saved: got base_model" in outcome.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("more", [("--learning_rate", 0), ("--max_steps", 1, "--warmup_steps", 5)])
def test_an_adapter_that_no_step_has_changed_is_not_saved(
    more: tuple[object, ...], inside, tmp_path: Path, run
) -> None:
    outcome = run(*inside, *more)
    assert outcome.code == 1 and "the adapter is as it began, and is not saved" in outcome.err
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_no_learning_rate_is_blamed_for_a_first_step(inside, changed, run) -> None:
    directory = changed(lambda tensors: tensors[FC].fill_(1e38))  # finite, and the products are not
    outcome = run(*inside, "--model_name_or_path", directory)
    assert outcome.code == 1
    assert "is not finite (at step 1)\nhint: nothing was trained yet: look at the model's" in outcome.err
    assert "learning rate" not in outcome.err


@pytest.mark.parametrize("more", [(), ("--do_sample",), ("--num_beams", 2)])
def test_a_model_whose_logits_are_no_numbers_completes_nothing(more: tuple[object, ...], changed, run) -> None:
    """The likeliest of tokens that are all NaN is the first one, which may well end the text."""
    directory = changed(lambda tensors: tensors[FC].fill_(1e38))
    where = ("--model_name_or_path", directory, "--profile", "enclave")
    outcome = run("generate", *where, "--prompt", "a", "--max_new_tokens", 2, *more)
    assert (outcome.code, outcome.out) == (1, "") and "the logits of the model are not finite" in outcome.err


def test_a_run_of_no_step_is_no_success(inside, run) -> None:
    outcome = run(*inside, "--max_steps", 0, "--num_train_epochs", 0)
    assert outcome.code == 2 and "no step was trained" in outcome.err


def test_rows_that_the_model_cannot_learn_as_they_are_get_a_warning(inside, tmp_path: Path, run) -> None:
    rows = [{"prompt": "p" * 20, "completion": "c" * 100}, {"text": "one <end> two <start> three<end>"}]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "".join(json.dumps(row) + "\n" for row in rows).encode())  # a BOM before them
    outcome = run(*inside, "--train_file", path)
    assert outcome.code == 0, outcome.err
    assert "1 dropped prompts" in outcome.err and "2 special tokens in texts" in outcome.err
    assert f"warning: {path}: 1 rows have lost all of their prompt" in outcome.err
    assert "the texts spell special tokens of the tokenizer, 2 times" in outcome.err
    report = json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["training"]


def test_an_output_directory_that_cannot_be_written_is_found_before_the_first_step(inside, run) -> None:
    outcome = run(*inside, "--output_dir", "/proc/self/task", "--overwrite_output_dir")
    assert outcome.code == 2 and "cannot write into the directory" in outcome.err and "keying" not in outcome.err


def test_an_output_directory_that_is_none_is_told_as_what_it_is(inside, tmp_path: Path, run) -> None:
    (tmp_path / "file").touch()
    for name, message in (("file", "not an output directory: got a file"), ("a" * 300, "got File name too long")):
        outcome = run(*inside, "--output_dir", tmp_path / name)
        assert outcome.code == 2 and message in outcome.err and "overwrite" not in outcome.err


@pytest.mark.parametrize("stuck", [False, True])
def test_sigterm_saves_what_was_trained_within_a_bound(stuck: bool, inside, tmp_path: Path, run, monkeypatch) -> None:
    step = ProtectedTrainer.training_step

    def interrupted(self: ProtectedTrainer, *arguments: Any, **named: Any) -> Any:
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            if self._protected.session is not None:  # a scheduler's signal goes to the whole process group
                self._protected.session.process.send_signal(signal.SIGTERM)
            if stuck:
                threading.Event().wait(60)
        return step(self, *arguments, **named)

    monkeypatch.setattr(ProtectedTrainer, "training_step", interrupted)
    where = ("--stop_seconds", 0.2) if stuck else ("--profile", "balanced", "--worker", "spawn")
    outcome = run(*inside, "--max_steps", 5, *where)
    assert outcome.code == 143
    last = tmp_path / "out" / f"checkpoint-{2 if stuck else 3}"
    assert f"--resume_from_checkpoint {last}" in outcome.err and last.is_dir()
    assert ("the step did not end within 0.2 s and is lost" in outcome.err) == stuck
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and signal.getitimer(signal.ITIMER_REAL)[0] == 0


@pytest.mark.parametrize("when", ["step", "save"])
def test_no_evaluation_begins_after_a_signal(when: str, inside, train_file: Path, tmp_path: Path, run, monkeypatch):
    """It may take longer than whoever has sent the signal waits."""
    evaluated: list[int] = []

    def evaluate(self: ProtectedTrainer, *arguments: Any, **named: Any) -> Any:
        evaluated.append(self.state.global_step)
        threading.Event().wait(60)

    name = "training_step" if when == "step" else "_write_checkpoint"  # in mid-epoch, or at the end of one
    function, last = getattr(ProtectedTrainer, name), 2 if when == "step" else 5

    def interrupted(self: ProtectedTrainer, *arguments: Any, **named: Any) -> Any:
        if self.state.global_step == (1 if when == "step" else 5):
            os.kill(os.getpid(), signal.SIGTERM)
        return function(self, *arguments, **named)

    monkeypatch.setattr(ProtectedTrainer, "evaluate", evaluate)
    monkeypatch.setattr(ProtectedTrainer, name, interrupted)
    more = ("--max_steps", 8, "--save_steps", 5, "--validation_file", train_file, "--stop_seconds", 4)
    outcome = run(*inside, *more)
    assert outcome.code == 143 and evaluated == [], outcome.err
    assert "is lost" not in outcome.err
    assert f"interrupted: go on with the same options and --resume_from_checkpoint {tmp_path / 'out'}" in outcome.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"checkpoint-{last}"]


@pytest.mark.parametrize("last", [False, True])
def test_only_a_complete_training_is_evaluated_after_a_signal(last: bool) -> None:
    """With evaluations between steps, which a program of its own may ask for."""
    interrupt, control = StopOnSignal(), TrainerControl(should_evaluate=True)
    interrupt.requested = signal.SIGTERM
    interrupt.on_step_end(None, TrainerState(global_step=8 if last else 7, max_steps=8), control)
    assert control.should_evaluate == last and control.should_save and control.should_training_stop


def test_a_step_that_is_saved_is_not_called_lost(inside, train_file: Path, tmp_path: Path, run, monkeypatch) -> None:
    def evaluate(self: ProtectedTrainer, *arguments: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(60)

    monkeypatch.setattr(ProtectedTrainer, "evaluate", evaluate)
    outcome = run(*inside, "--validation_file", train_file, "--stop_seconds", 0.2)
    assert outcome.code == 143
    assert "interrupted: step 3 is saved, and what follows it did not end within 0.2 s; go on with" in outcome.err
    assert f"--resume_from_checkpoint {tmp_path / 'out' / 'checkpoint-3'}" in outcome.err


@pytest.mark.parametrize(("names", "missing"), [("c_attn,c_porj", "c_porj"), ("c_attn proj", "proj")])
def test_a_layer_that_the_model_has_not_is_not_passed_over(
    names: str, missing: str, inside, tmp_path: Path, run
) -> None:
    outcome = run(*inside, "--lora_target_modules", names)
    assert outcome.code == 2
    assert f"the adapter does not fit the model: got {missing} (at lora_target_modules)" in outcome.err
    assert "hint: for this family: c_attn" in outcome.err
    assert not (tmp_path / "out").exists()
