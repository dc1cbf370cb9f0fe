"""Which failures of a save are the disk's, and whose keys a checkpoint holds."""

import dataclasses
import json
from pathlib import Path

import pytest

from obfuscatune.enclave.keys import MasterSecret
from obfuscatune.errors import ObfuscatuneError, UsageError
from obfuscatune.profiles import PROFILES, resolve
from obfuscatune.training.checkpoints import PROFILE_FILE, load_keys, whole_checkpoint


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
        whole_checkpoint(path, MasterSecret.generate(), PROFILES["balanced"]),
    ):
        raise raised
    assert caught.type is reported
    assert not path.exists()


def test_keys_are_of_switches_rather_than_of_names(tmp_path: Path) -> None:
    profile = resolve("balanced", mlp="enclave")
    path = tmp_path / "checkpoint-1"
    with whole_checkpoint(path, MasterSecret.generate(), profile):
        pass
    assert json.loads((path / PROFILE_FILE).read_text())["profile"] == profile.name
    load_keys(path, dataclasses.replace(profile, name="mine"))
    with pytest.raises(UsageError, match=r"got balanced\+mlp=enclave with head_keys=True, expected head_keys=False"):
        load_keys(path, dataclasses.replace(profile, head_keys=False))
