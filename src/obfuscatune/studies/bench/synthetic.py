"""A model directory with random weights of a true shape, written without ever holding the model.

Speed and memory do not depend on what the weights are. Shards are one for each decoder block, one for each large tensor
outside of them, and one for the rest.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from obfuscatune.enclave.families import read_decoder
from obfuscatune.enclave.families.empty import empty_model
from obfuscatune.errors import UsageError
from obfuscatune.parties.sealed.tensor_table import INDEX_FILE

_LARGE = 1 << 24  # numbers of a tensor that gets a shard of its own
_SPREAD = 0.02  # of weights, as most models are initialized; norms are 1 and biases have it too


def write_random_model(config: Any, dtype: str, directory: Path) -> None:
    """Write ``config.json``, an index and shards, as ``save_pretrained`` does. Memory: one shard, twice.

    Args:
        config: a ``transformers`` configuration. dtype: of the weights on disk. directory: there already, and empty.

    Raises:
        UsageError: the disk has no room for it. UnsupportedModelError: no decoder blocks are found.
    """
    skeleton = empty_model(config, dtype=getattr(torch, dtype))
    tied = (skeleton._tied_weights_keys or {}) if config.tie_word_embeddings else {}
    shapes = {name: tensor for name, tensor in skeleton.state_dict().items() if name not in tied}
    size = sum(tensor.numel() * tensor.element_size() for tensor in shapes.values())
    free = shutil.disk_usage(directory).free
    if size > free:
        raise UsageError(
            "no room for the random weights", got=f"{free >> 20} MiB free", expected=size >> 20, where=str(directory)
        )
    generator = torch.Generator().manual_seed(0)
    where: dict[str, str] = {}
    for number, names in enumerate(_shards(shapes, read_decoder(skeleton).blocks_path), 1):
        file = f"model-{number:05d}.safetensors"
        save_file({name: _random(shapes[name], generator) for name in names}, directory / file, {"format": "pt"})
        where.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (directory / INDEX_FILE).write_text(json.dumps(index))
    config.dtype = dtype
    config.save_pretrained(directory)


def _shards(shapes: dict[str, Tensor], blocks: str) -> Iterator[list[str]]:
    groups: dict[str, list[str]] = {}
    for name, tensor in shapes.items():
        number = name.removeprefix(f"{blocks}.").partition(".")[0] if name.startswith(f"{blocks}.") else ""
        groups.setdefault(number or (name if tensor.numel() > _LARGE else ""), []).append(name)
    yield from groups.values()


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype)
    values = torch.empty(like.shape, dtype=like.dtype)
    centre = 1.0 if like.ndim == 1 else 0.0
    for part in torch.split(values.view(-1), _LARGE):  # drawn in float32, and never all of it
        part.copy_(torch.empty(len(part), dtype=torch.float32).normal_(centre, _SPREAD, generator=generator))
    return values
