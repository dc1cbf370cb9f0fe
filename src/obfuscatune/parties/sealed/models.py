"""Which files of a model's directory are sealed: all, or none with the reason; nothing is left out in silence."""

import os
from pathlib import Path
from typing import BinaryIO

from obfuscatune.errors import FormatError, UsageError
from obfuscatune.parties.files import read_small
from obfuscatune.parties.sealed.contents import check_name
from obfuscatune.parties.sealed.tensor_table import locate

CONFIG_FILE = "config.json"
SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".tiktoken", ".jinja", ".md")
NAMES = ("LICENSE", "NOTICE")
# Formats of weights that run code when they are loaded, or that the enclave does not read.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".onnx", ".gguf", ".npz")


class _Directory:
    """A directory as named files."""

    def __init__(self, root: Path, names: list[str]) -> None:
        self._root, self._names = root, names

    def names(self) -> list[str]:
        return self._names

    def size(self, name: str) -> int:
        return (self._root / name).stat().st_size

    def open(self, name: str) -> BinaryIO:
        return (self._root / name).open("rb")

    def read(self, name: str, max_bytes: int) -> bytes:
        return read_small(self._root / name, max_bytes, name)


def model_files(directory: Path) -> dict[str, Path]:
    """Return the files of a transformers model directory, by name, sorted.

    The safetensors headers are checked as the enclave will check them, so that a provider meets the fault first.

    Raises:
        UsageError: no such directory, or a file that is not sealed: a link, a pickle, code, another format.
        FormatError: weights that are missing, incomplete or do not agree with their header.
    """
    if not directory.is_dir():
        raise UsageError("no such model directory", got=str(directory))
    try:
        names = sorted(_walk(directory, directory))
        if CONFIG_FILE not in names:
            hint = "give the directory that save_pretrained has written"
            raise UsageError(f"model has no {CONFIG_FILE}", where=str(directory), hint=hint)
        used = {place.file for place in locate(_Directory(directory, names)).values()}
    except OSError as error:
        raise UsageError("cannot read the model", got=error.strerror, where=str(directory)) from None
    for name in names:
        if name.endswith(".safetensors") and name not in used:
            hint = "move it out of the directory: it would be sealed and never used"
            raise UsageError("weights that are no part of the model", where=str(directory / name), hint=hint)
    return {name: directory / name for name in names}


def _walk(root: Path, folder: Path) -> list[str]:
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            path = Path(entry.path)
            if entry.is_symlink():
                hint = "links are not followed; copy what they lead to: cp -rL MODEL COPY"
                raise UsageError("a link in the model's directory", where=entry.path, hint=hint)
            if entry.is_dir():
                found += _walk(root, path)
            else:
                _check_file(path)
                name = path.relative_to(root).as_posix()
                try:
                    found.append(check_name(name))
                except FormatError as error:
                    raise UsageError(error.what, expected=error.expected, where=entry.path) from None
    return found


def _check_file(path: Path) -> None:
    if path.suffix in _OTHER_WEIGHTS:
        hint = "save the model again with save_pretrained, which writes safetensors; then move this file away"
        raise UsageError("weights in a format that is not sealed", where=str(path), hint=hint)
    if path.suffix == ".py":
        hint = "only architectures that transformers has itself are run; move the file out of the directory"
        raise UsageError("code in the model's directory", where=str(path), hint=hint)
    if path.suffix not in SUFFIXES and path.name not in NAMES:
        expected = f"*{', *'.join(SUFFIXES)}, {', '.join(NAMES)}"
        hint = "move the file out of the directory; nothing is left out in silence"
        raise UsageError("a file that is no part of a model", where=str(path), expected=expected, hint=hint)
