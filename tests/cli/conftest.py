"""A tiny model on disk, rows to teach it, and a real worker process that all tests of the command line share."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from obfuscatune.cli import main

COMMAND = [sys.executable, "-m", "obfuscatune"]


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process."""

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return Outcome(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=258,
        n_embd=24,
        n_layer=2,
        n_head=3,
        n_positions=64,
        attn_pdrop=0.0,
        bos_token_id=257,
        eos_token_id=256,
    )
    GPT2LMHeadModel(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"row {i} is", "completion": f" {i * i}"}) + "\n" for i in range(24)))
    return path


def start_worker(address: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(  # noqa: S603
        [*COMMAND, "worker", "--listen", address, "--threads", "1"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith(f"worker listening on {address} (cpu, 1 session of ")
    return process


@pytest.fixture(scope="session")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a worker, which ends cleanly on SIGTERM and takes its socket with it."""
    path = tmp_path_factory.mktemp("worker") / "socket"
    with start_worker(f"unix://{path}") as process:
        yield f"unix://{path}"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    assert not path.exists()


@pytest.fixture
def finetune(model_dir: Path, train_file: Path, worker: str) -> list[object]:
    """A fine-tuning of six steps with a checkpoint after three, but for its output directory."""
    return [
        *("finetune", "--model_name_or_path", model_dir, "--train_file", train_file, "--worker", worker),
        *("--max_steps", 6, "--save_steps", 3, "--logging_steps", 1, "--learning_rate", 1e-2, "--weight_decay", 0.1),
        *("--per_device_train_batch_size", 5, "--warmup_steps", 2, "--lora_r", 4),
    ]
