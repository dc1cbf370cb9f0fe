"""A model out of a sealed file: its small files in memory, its weights read as they are keyed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from obfuscatune.enclave.lazy import load_lazily
from obfuscatune.errors import UnsupportedModelError
from obfuscatune.parties.sealed.archive import SealedArchive
from obfuscatune.parties.sealed.tensors import SealedTensors

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
# Read by transformers from a directory; no name of a file that holds code is among them.
SMALL_FILES = (
    *(CONFIG_FILE, GENERATION_FILE, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja"),
)
MAX_SMALL_BYTES = 64 << 20


@dataclass(frozen=True)
class OpenedModel:
    """The plain model of a sealed file; its large weights are filled while it is protected. Secret."""

    model: Any
    tokenizer: Any


def open_model(archive: SealedArchive, ram: Path, dtype: str) -> OpenedModel:
    """Open the model of ``archive``; the archive must stay open until the model is protected.

    Args:
        archive: of kind ``model``. ram: a directory in memory, for the small files that libraries read by path.
        dtype: of the weights.

    Raises:
        FormatError, SealError: a file that breaks its format or was changed.
        UnsupportedModelError: a model that cannot be run exactly.
    """
    from obfuscatune.training.loading import load_config, load_generation_settings, load_tokenizer

    directory = ram / "model"
    directory.mkdir(mode=0o700)
    for name in archive.names():
        if name in SMALL_FILES:
            (directory / name).write_bytes(archive.read(name, MAX_SMALL_BYTES))
    if not (directory / CONFIG_FILE).exists():
        raise UnsupportedModelError("the sealed model has no configuration", expected=CONFIG_FILE)
    config = load_config(str(directory))
    tokenizer = load_tokenizer(str(directory), config)
    tokenizer.padding_side = "left"  # completions continue the last position of every row
    found = load_lazily(config, SealedTensors(archive), getattr(torch, dtype))
    if (directory / GENERATION_FILE).exists():  # completions stop where the provider's own do; all else is the job's
        found.generation_config.eos_token_id = load_generation_settings(str(directory)).eos_token_id
    return OpenedModel(found, tokenizer)
