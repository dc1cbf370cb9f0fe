"""Fine-tuning and generation from the command line, with a real worker process."""

import json
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from obfuscatune.cli import main
from obfuscatune.enclave.keys import MasterSecret
from obfuscatune.training.checkpoints import SECRET_FILE
from obfuscatune.training.trainer import ProtectedTrainer

from .conftest import COMMAND, start_worker


def adapter(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_the_adapter_loads_in_peft_and_generates_the_same(
    finetune: list[object], model_dir: Path, worker: str, tmp_path: Path, run
) -> None:
    output = tmp_path / "adapter"
    outcome = run(*finetune, "--output_dir", output, "--validation_file", finetune[4])
    assert outcome.code == 0, outcome.err
    for name in (
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
        "boundary_bytes",
        "boundary_calls",
        "eval_loss",
    ):
        assert f"{name} " in outcome.err
    assert "row 3" not in outcome.err + outcome.out, "logs hold data"
    report = json.loads((output / "report.json").read_text())
    losses = [entry["loss"] for entry in report["training"] if "loss" in entry]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert not list(output.glob(".adapter-*"))
    for path, mode in (
        (output, 0o700),
        (output / "checkpoint-3", 0o700),
        (output / "checkpoint-3" / SECRET_FILE, 0o600),
    ):
        assert stat.S_IMODE(path.stat().st_mode) == mode

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), output).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    prompts = ["row 3 is", "a prompt of another length"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    plain = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=256,
    )
    expected = tokenizer.batch_decode(plain[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    generate = ["generate", "--model_name_or_path", model_dir, "--worker", worker, "--max_new_tokens", 6]
    both = [word for prompt in prompts for word in ("--prompt", prompt)]
    rows = tmp_path / "completions.jsonl"
    outcome = run(*generate, "--adapter_name_or_path", output, *both, "--output_file", rows)
    assert (outcome.code, outcome.out) == (0, "".join(f"{text}\n" for text in expected)), outcome.err
    assert [json.loads(line) for line in rows.read_text().splitlines()] == [
        {"prompt": prompt, "completion": text} for prompt, text in zip(prompts, expected, strict=True)
    ]
    assert stat.S_IMODE(rows.stat().st_mode) == 0o600
    assert run(*generate, *both, "--output_file", rows).code == 2, "an older file is written over"
    assert run(*generate, *both).out != outcome.out, "the adapter makes no difference"


@pytest.mark.filterwarnings("ignore:attn.resid_dropout")
@pytest.mark.parametrize("profile", ["balanced", "paper", "stream"])
def test_a_resumed_run_ends_in_the_same_bits(profile: str, finetune: list[object], tmp_path: Path, run) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    command = [*finetune, "--profile", profile]
    assert run(*command, "--output_dir", whole).code == 0

    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    (resumed / "checkpoint-4").mkdir()  # its writer died: it does not say what it is, and is not taken for the last
    outcome = run(*command, "--output_dir", resumed, "--resume_from_checkpoint", "last")
    assert outcome.code == 0, outcome.err
    assert not equal(adapter(whole / "checkpoint-3"), adapter(whole))
    assert equal(adapter(resumed), adapter(whole))

    if profile == "paper":  # the state of the worker's optimizer is of these keys only
        other = tmp_path / "other" / "checkpoint-3"
        shutil.copytree(whole / "checkpoint-3", other)
        MasterSecret.generate().save(other / SECRET_FILE)
        outcome = run(*command, "--output_dir", other.parent, "--resume_from_checkpoint", other)
        assert outcome.code == 2 and f"a file of the checkpoint is damaged: got {SECRET_FILE}" in outcome.err
    elif profile == "balanced":
        outcome = run(*command, "--mlp", "enclave", "--output_dir", resumed, "--resume_from_checkpoint", "true")
        assert outcome.code == 2 and "checkpoint of another profile" in outcome.err
        assert "got balanced with mlp=worker, expected mlp=enclave" in outcome.err


@pytest.mark.filterwarnings("ignore:attn.resid_dropout")
@pytest.mark.parametrize(
    "switches", [(), ("--profile", "paper"), ("--profile", "stream"), ("--lora_placement", "split", "--mlp", "enclave")]
)
def test_a_bfloat16_model_has_a_float32_adapter(switches: tuple[str, ...], finetune, tmp_path: Path, run) -> None:
    outcome = run(*finetune, "--dtype", "bfloat16", "--max_steps", 2, *switches, "--output_dir", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert {tensor.dtype for tensor in adapter(tmp_path / "out").values()} == {torch.float32}


@pytest.mark.filterwarnings("always:lora_placement")
def test_norms_are_unfolded_with_one_warning(finetune: list[object], tmp_path: Path, run) -> None:
    outcome = run(*finetune, "--max_steps", 2, "--lora_placement", "worker", "--output_dir", tmp_path / "out")
    assert (outcome.code, outcome.err.count("norms are not folded")) == (0, 1), outcome.err


def test_bad_rows_are_refused_with_file_and_line(finetune: list[object], tmp_path: Path, run) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "zebra"}\n{"txet": "zebra"}\n')
    outcome = run(*finetune, "--train_file", path, "--output_dir", tmp_path / "out")
    assert outcome.code == 2
    assert f"(at {path}:2)" in outcome.err and "zebra" not in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_schedule_with_arguments_of_its_own_is_refused(finetune: list[object], tmp_path: Path, run) -> None:
    for name in ("warmup_stable_decay", "cosine_with_min_lr"):
        outcome = run(*finetune, "--lr_scheduler_type", name, "--output_dir", tmp_path / name)
        assert outcome.code == 2 and f"a schedule with arguments of its own: got {name}" in outcome.err


def test_settings_of_generation_that_transformers_refuses(model_dir: Path, tmp_path: Path, run) -> None:
    settings: dict[str, Any] = {"stop_strings": ["a"], "bad_words_ids": [[9999]], "eos_token_id": "zebra"}
    for name, value in settings.items():
        directory = shutil.copytree(model_dir, tmp_path / name)
        (directory / "generation_config.json").write_text(json.dumps({name: value}))
        outcome = run("generate", "--model_name_or_path", directory, "--profile", "enclave", "--prompt", "a")
        assert outcome.code == 2 and "generation_config.json" in outcome.err, outcome.err
        assert "zebra" not in outcome.err


def test_an_output_directory_in_use_is_not_written_to(finetune: list[object], tmp_path: Path, run) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    outcome = run(*finetune, "--output_dir", tmp_path)
    assert outcome.code == 2 and "hint: --overwrite_output_dir" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    outcome = run(*finetune, "--output_dir", tmp_path, "--resume_from_checkpoint", "last")
    assert outcome.code == 2 and "no checkpoint to resume from" in outcome.err


def test_one_run_at_a_time_writes_into_a_directory(
    finetune: list[object], tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    command = [*finetune[:5], *finetune[7:], "--profile", "enclave", "--output_dir", output]
    train, codes = ProtectedTrainer.train, []

    def meanwhile(self: ProtectedTrainer, *arguments: Any, **named: Any) -> Any:
        monkeypatch.setattr(ProtectedTrainer, "train", train)
        for more in ((), ("--overwrite_output_dir",), ("--resume_from_checkpoint", "last")):
            codes.append(main([str(word) for word in [*command, *more]]))
        return train(self, *arguments, **named)

    monkeypatch.setattr(ProtectedTrainer, "train", meanwhile)
    outcome = run(*command)
    assert outcome.code == 0, outcome.err
    assert codes == [2, 2, 2]
    assert outcome.err.count(f"another run writes into this directory (at {output})") == 3
    assert run(*command, "--resume_from_checkpoint", "last").code == 0  # the lock went with the run
    assert not [path.name for path in output.iterdir() if "lock" in path.name]


def test_a_run_that_is_over_before_another_one_is_ready_is_not_overwritten(
    finetune: list[object], tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is read and keyed between the first look at the directory and the first write."""
    from obfuscatune.training import loading

    output = tmp_path / "out"
    command = [*finetune[:5], *finetune[7:], "--profile", "enclave", "--output_dir", output]
    load = loading.load

    def slowly(*arguments: Any) -> Any:
        monkeypatch.setattr(loading, "load", load)
        assert main([str(word) for word in command]) == 0
        return load(*arguments)

    monkeypatch.setattr(loading, "load", slowly)
    outcome = run(*command)
    assert outcome.code == 2 and f"output directory is not empty (at {output})" in outcome.err
    assert {"adapter_config.json", "checkpoint-3", "checkpoint-6"} < {path.name for path in output.iterdir()}


def with_little_disk(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``function`` with files of at most 4 KiB: every write beyond that fails, whoever makes it."""

    def limited(*arguments: Any, **named: Any) -> Any:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            return function(*arguments, **named)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.mark.parametrize("what", ["adapter", "checkpoint", "last checkpoint"])
def test_a_full_disk_leaves_nothing_half_written(
    what: str, finetune: list[object], tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from obfuscatune.training import checkpoints

    if what == "adapter":
        monkeypatch.setattr(checkpoints, "save_adapter", with_little_disk(checkpoints.save_adapter))
    else:
        save = ProtectedTrainer._write_checkpoint
        little, last = with_little_disk(save), what != "checkpoint"

        def saved(self: ProtectedTrainer, *arguments: Any) -> None:
            (save if last and self.state.global_step < 6 else little)(self, *arguments)

        monkeypatch.setattr(ProtectedTrainer, "_write_checkpoint", saved)
    output = tmp_path / "out"
    outcome = run(*finetune, "--output_dir", output)
    if what == "last checkpoint":  # nothing is left to be trained, and the adapter finds room
        assert outcome.code == 0 and "warning: cannot save the checkpoint, the last one" in outcome.err
        assert adapter(output) and [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-3"]
        return
    assert outcome.code == 1
    assert f"error: cannot save the {what}: got " in outcome.err and f"(at {output})" in outcome.err
    assert re.search(r": got (File too large|a file that could not be written to its end) \(at", outcome.err)
    left = sorted(path.name for path in output.iterdir())
    assert left == (["checkpoint-3", "checkpoint-6"] if what == "adapter" else [])


def test_a_dead_worker_is_named_with_the_checkpoint_to_resume_from(
    finetune: list[object], tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"unix://{tmp_path / 'socket'}"
    log = ProtectedTrainer.log

    def log_and_kill(self: ProtectedTrainer, *arguments: Any, **named: Any) -> None:
        log(self, *arguments, **named)
        if self.state.global_step == 4:
            process.kill()
            process.wait()

    monkeypatch.setattr(ProtectedTrainer, "log", log_and_kill)
    output = tmp_path / "out"
    with start_worker(address) as process:
        finetune[finetune.index("--worker") + 1] = address
        outcome = run(*finetune, "--output_dir", output)
    assert outcome.code == 1
    # Its sessions end some milliseconds after it, in whichever layer the step has come to.
    assert re.search(rf"worker {re.escape(address)}, layer transformer\.h\.\d\.\w+, call ", outcome.err), outcome.err
    assert f"--resume_from_checkpoint {output / 'checkpoint-3'}" in outcome.err
    assert not (output / "adapter_config.json").exists()


def test_ctrl_c_in_the_last_evaluation_keeps_what_was_trained(
    finetune: list[object], tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = ProtectedTrainer.evaluate

    def interrupted(self: ProtectedTrainer, *arguments: Any, **named: Any) -> Any:
        if self.state.global_step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(self, *arguments, **named)

    monkeypatch.setattr(ProtectedTrainer, "evaluate", interrupted)
    output = tmp_path / "out"
    outcome = run(*finetune, "--validation_file", finetune[4], "--save_steps", 100, "--output_dir", output)
    assert outcome.code == 0 and "interrupted after the last step" in outcome.err
    assert adapter(output)


@pytest.mark.parametrize("signals", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_leaves_a_checkpoint(signals: int, finetune: list[object], tmp_path: Path) -> None:
    output = tmp_path / "out"
    # A huge step, so that the second signal finds the first one's step still running.
    steps = [
        "--max_steps",
        "100000",
        "--save_steps",
        "100000",
        "--gradient_accumulation_steps",
        "1" if signals == 1 else "2000",
    ]
    command = [*COMMAND, *map(str, finetune), *steps, "--output_dir", str(output)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:  # noqa: S603
        assert process.stderr is not None
        marker = "step 1 " if signals == 1 else "0/100000"
        for expected in [marker, "Ctrl-C again"][:signals]:
            for line in process.stderr:
                if expected in line:
                    break
            process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert "Traceback" not in rest
    saved = sorted(path.name for path in output.iterdir())
    if signals == 1:
        assert len(saved) == 1 and f"--resume_from_checkpoint {output / saved[0]}" in rest
    else:
        assert saved == []
