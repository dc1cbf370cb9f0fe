"""Which files of a model's directory are sealed: all, or none with the reason."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from obfuscatune.errors import FormatError, UsageError
from obfuscatune.parties.sealed.models import model_files


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    (directory / "additional_chat_templates").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "generation_config.json", "merges.txt", "LICENSE", "README.md"):
        (directory / name).write_text("{}")
    (directory / "additional_chat_templates" / "short.jinja").touch()
    save_file({"a": torch.zeros(3)}, directory / "model.safetensors")
    return directory


def test_all_files_are_there_in_order(model: Path) -> None:
    files = model_files(model)
    assert list(files) == sorted(files) and len(files) == 8
    assert all((model / name) == path for name, path in files.items())
    assert "additional_chat_templates/short.jinja" in files


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", "safetensors"),
        ("model.pt", "safetensors"),
        ("old/model.pkl", "safetensors"),
        ("modeling_custom.py", "code"),
        ("notes.docx", "no part of a model"),
        (".gitattributes", "no part of a model"),
        (".hidden.json", "name of a file"),
        ("a b.json", "name of a file"),
        ("consolidated.safetensors", "no part of the model"),
    ],
)
def test_files_that_are_refused(name: str, message: str, model: Path) -> None:
    path = model / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x")
    with pytest.raises(UsageError, match=message) as caught:
        model_files(model)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("directory", [True, False])
def test_links_are_refused(directory: bool, model: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "passwords.txt").write_text("x")
    target = tmp_path / "secret" if directory else tmp_path / "secret" / "passwords.txt"
    (model / "vocab.txt").symlink_to(target)
    with pytest.raises(UsageError, match="a link"):
        model_files(model)


def test_what_is_no_model(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such model directory"):
        model_files(tmp_path / "nowhere")
    (model / "config.json").unlink()
    with pytest.raises(UsageError, match=r"no config\.json"):
        model_files(model)


def test_weights_are_checked_as_the_enclave_checks_them(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"x")
    with pytest.raises(FormatError, match="do not fill"):
        model_files(model)
    weights.unlink()
    with pytest.raises(FormatError, match="neither"):
        model_files(model)
