"""Several enclaves that train one adapter: equal to one process with as many more accumulation steps."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from obfuscatune.errors import UsageError
from obfuscatune.profiles import PROFILES
from obfuscatune.training.ranks import Ranks

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TOLERANCE = 3e-6  # float32; of weights that moved by 1e-3. AdamW magnifies rounding; measured 1.1e-6


def run(prefix: list[str], arguments: list[object]) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    command = [*prefix, "-m", "obfuscatune", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)  # noqa: S603


def finetune(model_dir: Path, train_file: Path, output: Path, *more: object) -> list[object]:
    return [
        *("finetune", "--model_name_or_path", model_dir, "--train_file", train_file, "--output_dir", output),
        *("--per_device_train_batch_size", 2, "--max_steps", 4, "--save_steps", 2, "--learning_rate", 1e-3),
        *("--threads", 1, *more),
    ]


@pytest.fixture
def still_model(model_dir: Path, tmp_path: Path) -> Path:
    """The model without dropout: two processes draw other random numbers than one.

    Its biases and norms are random. In a new model biases are 0, and so is what keys add to them, which each process
    has of its own.
    """
    directory = Path(shutil.copytree(model_dir, tmp_path / "model"))
    still = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel.from_pretrained(model_dir, **still)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(noise if name.endswith("bias") else 1 + noise)
    model.save_pretrained(directory)
    return directory


@pytest.mark.slow
def test_two_processes_equal_twice_the_accumulation(still_model: Path, train_file: Path, tmp_path: Path) -> None:
    one = run([sys.executable], finetune(still_model, train_file, tmp_path / "one", "--gradient_accumulation_steps", 2))
    assert one.returncode == 0, one.stderr
    two = run(TORCHRUN, finetune(still_model, train_file, tmp_path / "two"))
    assert two.returncode == 0, two.stderr
    expected, got = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert expected.keys() == got.keys()
    assert any(tensor.abs().max() > 1e-4 for name, tensor in expected.items() if "lora_B" in name), "nothing was learnt"
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=TOLERANCE)
    assert two.stdout.count("profile balanced") == 1, "one process reports"
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(
        path.name for path in (tmp_path / "one").iterdir()
    )
    # A resumed run ends where the whole one did.
    resumed = tmp_path / "two" / "checkpoint-4"
    before = load_file(resumed / "adapter_model.safetensors")
    for path in sorted(resumed.iterdir()):
        path.unlink()
    resumed.rmdir()
    arguments = finetune(still_model, train_file, tmp_path / "two", "--resume_from_checkpoint", "last")
    again = run(TORCHRUN, arguments)
    assert again.returncode == 0, again.stderr
    assert all(torch.equal(load_file(resumed / "adapter_model.safetensors")[name], before[name]) for name in before)


@pytest.mark.slow
def test_what_several_processes_cannot_do_is_one_error(model_dir: Path, train_file: Path, tmp_path: Path) -> None:
    outcome = run(TORCHRUN, finetune(model_dir, train_file, tmp_path / "out", "--profile", "paper"))
    assert outcome.returncode != 0
    assert "error: several processes do not fit LoRA factors on the worker: got profile paper" in outcome.stderr
    assert not list((tmp_path / "out").glob("*"))


def environment(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "GLOO_DEVICE_TRANSPORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, RANK="3")
    assert Ranks.of_environment() == Ranks(0, 1, 1)


@pytest.mark.parametrize(
    ("said", "missing"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "LOCAL_WORLD_SIZE"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "LOCAL_WORLD_SIZE"),
        ({"LOCAL_RANK": "0"}, "RANK, WORLD_SIZE, LOCAL_WORLD_SIZE"),
    ],
)
def test_a_launch_by_hand_says_all(monkeypatch: pytest.MonkeyPatch, said: dict[str, str], missing: str) -> None:
    """The stock Trainer would take it for several processes, whose gradients gloo sends in the clear."""
    environment(monkeypatch, **said)
    with pytest.raises(UsageError, match=f"got no {missing}\nhint: torchrun sets them"):
        Ranks.of_environment()


def test_several_machines_need_an_encrypted_link(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, RANK="1", WORLD_SIZE="4", LOCAL_WORLD_SIZE="2")
    with pytest.raises(UsageError, match=r"in the clear: got 4 processes, 2 of them here"):
        Ranks.of_environment()
    monkeypatch.setenv("GLOO_DEVICE_TRANSPORT", "TCP_TLS")
    with pytest.raises(UsageError, match="in the clear"):  # without a key and a certificate it is not used
        Ranks.of_environment()
    monkeypatch.setenv("GLOO_DEVICE_TRANSPORT_TCP_TLS_PKEY", "key.pem")
    monkeypatch.setenv("GLOO_DEVICE_TRANSPORT_TCP_TLS_CERT", "certificate.pem")
    assert Ranks.of_environment() == Ranks(1, 4, 2)


def test_each_process_has_workers_of_its_own() -> None:
    assert Ranks(1, 2, 2).workers_of(["spawn"]) == ["spawn"]
    assert Ranks(1, 2, 2).workers_of(["tcp://a:1", "tcp://b:1"]) == ["tcp://b:1"]
    assert Ranks(0, 2, 2).workers_of(["a", "b", "c", "d"]) == ["a", "b"]
    for workers in (["a", "b", "c"], ["a"]):
        with pytest.raises(UsageError, match="not as many workers for each process"):
            Ranks(1, 2, 2).workers_of(workers)


def test_what_does_not_go_together() -> None:
    Ranks().check(PROFILES["paper"], overlap=True)
    Ranks(1, 2, 2).check(PROFILES["balanced"], overlap=False)
    with pytest.raises(UsageError, match="LoRA factors on the worker"):
        Ranks(1, 2, 2).check(PROFILES["paper"], overlap=False)
    with pytest.raises(UsageError, match="do not fit --overlap"):
        Ranks(1, 2, 2).check(PROFILES["balanced"], overlap=True)
