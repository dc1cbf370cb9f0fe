"""Which failures of a save are the disk's, and whose keys a checkpoint holds."""

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from obfuscatune.enclave.keys import MasterSecret
from obfuscatune.errors import ObfuscatuneError, UsageError
from obfuscatune.profiles import resolve
from obfuscatune.training.checkpoints import (
    RECORD_FILE,
    checkpoints,
    finish_checkpoint,
    load_checkpoint,
    new_checkpoint,
    save_adapter,
)


@pytest.mark.parametrize(
    ("raised", "reported"),
    [
        (OSError(28, "No space left on device"), ObfuscatuneError),
        (OSError(), ObfuscatuneError),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), ObfuscatuneError),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), ObfuscatuneError),
        (RuntimeError(), RuntimeError),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), RuntimeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_only_failed_writes_are_reported_as_such(
    raised: BaseException, reported: type[BaseException], tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint-1"
    with (
        pytest.raises(reported) as caught,
        new_checkpoint(path, MasterSecret.generate()),
    ):
        raise raised
    assert caught.type is reported
    assert not path.exists()


def test_keys_are_of_switches_rather_than_of_names(tmp_path: Path) -> None:
    profile = resolve("balanced", mlp="enclave")
    path = tmp_path / "checkpoint-1"
    with new_checkpoint(path, MasterSecret.generate()):
        pass
    assert checkpoints(tmp_path) == []
    finish_checkpoint(path, profile, {"seed": 1})
    assert checkpoints(tmp_path) == [path]
    assert json.loads((path / RECORD_FILE).read_text())["profile"] == profile.name
    assert load_checkpoint(path, dataclasses.replace(profile, name="mine"))[1] == {"seed": 1}
    with pytest.raises(UsageError, match=r"got balanced\+mlp=enclave with head_keys=True, expected head_keys=False"):
        load_checkpoint(path, dataclasses.replace(profile, head_keys=False))


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, set[str]]]:
    """Each file or directory that was brought to the disk, with the names that were beside or in it then."""
    found: list[tuple[str, set[str]]] = []
    fsync = os.fsync

    def noting(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        found.append((path.name, {each.name for each in (path if path.is_dir() else path.parent).iterdir()}))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noting)
    return found


def test_a_checkpoint_is_on_the_disk_before_it_counts(synced: list[tuple[str, set[str]]], tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-1"
    with new_checkpoint(path, MasterSecret.generate()):
        (path / "optimizer.pt").write_bytes(b"state")
    synced.clear()
    finish_checkpoint(path, resolve("balanced"), {})
    before = {name for name, names in synced if RECORD_FILE not in names}
    assert {"optimizer.pt", "master_secret", "checkpoint-1"} < before
    assert [name for name, _ in synced][-2:] == ["checkpoint-1", tmp_path.name]


def test_an_adapter_is_on_the_disk_before_it_has_its_name(
    synced: list[tuple[str, set[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Model:
        def save_pretrained(self, directory: Path, **options: Any) -> None:
            save_file({"lora_B": torch.ones(1)}, directory / "adapter_model.safetensors")
            (directory / "adapter_config.json").write_text("{}")

    output = tmp_path / "out"
    save_adapter(Model(), output)
    save_adapter(Model(), output)
    weights, settings = "adapter_model.safetensors", "adapter_config.json"
    again = synced[len(synced) // 2 :]
    assert [name for name, _ in again] == [weights, settings, "out", "out", "out", "out"]
    assert [settings in names for _, names in again[2:]] == [True, False, False, True]  # at first the older one
    assert {path.name for path in output.iterdir()} == {weights, settings}

    def refused(path: Path) -> None:
        if path.is_dir():
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr("obfuscatune.training.checkpoints.sync", refused)  # as some networks' file systems do
    with pytest.raises(ObfuscatuneError, match="cannot save the adapter"):
        save_adapter(Model(), output)
    assert {path.name for path in output.iterdir()} == {weights, settings}
