"""Which failures of a save are the disk's, and whose keys a checkpoint holds."""

import dataclasses
import json
from pathlib import Path

import pytest

from obfuscatune.enclave.keys import MasterSecret
from obfuscatune.errors import ObfuscatuneError, UsageError
from obfuscatune.profiles import resolve
from obfuscatune.training.checkpoints import (
    RECORD_FILE,
    checkpoints,
    finish_checkpoint,
    load_checkpoint,
    new_checkpoint,
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
