"""Single tensors of an ordinary model directory, so that a model is keyed layer by layer without being held whole.

A tensor is read into memory of its own, not mapped: pages of a mapped file would count as the enclave's until it is
closed, and stay there. Headers and index are read with the limits of `tensor_table`. Files that run code when they are
loaded, pickles, are never opened.
"""

import os
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from obfuscatune.errors import FormatError, UsageError
from obfuscatune.parties.sealed.tensor_table import INDEX_FILE, MODEL_FILE, Place, locate
from obfuscatune.parties.sealed.tensors import DTYPES

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class DirectoryTensors:
    """The tensors of ``model.safetensors``, or of the shards of its index, in a directory; a `TensorSource`.

    As for transformers, a single file comes before an index. No file outside the directory is opened by what an index
    says; links in the directory are followed, as the hub's cache is made of them.

    Raises:
        UsageError: no safetensors there, or tables that break the format, the limits, or do not agree.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            self._places = locate(_Files(directory))
        except FormatError as error:
            raise UsageError(
                f"weights of the model: {error.what}",
                got=error.got,
                expected=error.expected,
                where=str(directory),
                hint="save the model again with save_pretrained",
            ) from None
        except OSError as error:
            raise UsageError("cannot read the weights", got=error.strerror, where=str(directory)) from None

    def names(self) -> list[str]:
        """Return the tensors' names."""
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's sizes."""
        return self._place(name).shape

    def get(self, name: str) -> Tensor:
        """Return a tensor, on the CPU, as it is on disk. Secret.

        Raises:
            UsageError: no such tensor, or a file that cannot be read or has become shorter.
        """
        place = self._place(name)
        path = self._directory / place.file
        data = torch.empty(place.end - place.start, dtype=torch.uint8)
        try:
            with path.open("rb") as file:
                file.seek(place.start)
                count = file.readinto(data.numpy().data)
        except OSError as error:
            raise UsageError("cannot read the weights", got=error.strerror, where=str(path)) from None
        if count != len(data):
            raise UsageError("a file of weights has changed", got=f"{count} bytes", expected=len(data), where=str(path))
        return data.view(DTYPES[place.dtype]).reshape(place.shape)

    def _place(self, name: str) -> Place:
        if name not in self._places:
            raise UsageError("no such tensor in the model", got=repr(name), where=str(self._directory))
        return self._places[name]


class _Files:
    """The files right in a directory, for `locate`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        with os.scandir(directory) as entries:
            self._names = sorted(entry.name for entry in entries if entry.is_file())
        if MODEL_FILE in self._names:
            self._names = [name for name in self._names if name != INDEX_FILE]
        elif INDEX_FILE not in self._names:
            pickles = [name for name in self._names if name.endswith(_PICKLES)]
            hint = "load it where you trust its files, and save it with save_pretrained, which writes safetensors"
            what = "weights only in files that run code when they are loaded" if pickles else "no weights"
            raise UsageError(
                what,
                got=", ".join(pickles[:5]) or None,
                expected=f"{MODEL_FILE}, or {INDEX_FILE} and its shards",
                where=str(directory),
                hint=hint if pickles else "give the directory that save_pretrained has written",
            )

    def names(self) -> list[str]:
        return self._names

    def size(self, name: str) -> int:
        return (self._directory / name).stat().st_size

    def open(self, name: str) -> BinaryIO:
        return (self._directory / name).open("rb")

    def read(self, name: str, max_bytes: int) -> bytes:
        if self.size(name) > max_bytes:
            raise FormatError(f"{name} is too long", expected=f"at most {max_bytes} bytes")
        return (self._directory / name).read_bytes()
