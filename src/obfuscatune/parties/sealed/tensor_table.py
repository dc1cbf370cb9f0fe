"""Where each tensor of a model is: headers of safetensors files and the index of shards, read with limits.

    safetensors file = length N of the header, u64 little-endian || header, JSON || elements

The provider of a model is not trusted with the enclave's memory: lengths come before allocation, and what the header
says of a tensor must agree with itself, with its neighbours and with the file. Format: the safetensors README.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

from obfuscatune.errors import FormatError

MODEL_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
MAX_JSON_BYTES = 25_000_000
MAX_JSON_VALUES = 1 << 20  # about 100 bytes of memory each
MAX_TENSOR_BYTES = 1 << 40
MAX_DIMS = 8
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}
_NAME = re.compile(r"[!-~]{1,256}")


class Files(Protocol):
    """Named files: a sealed archive, or a directory that is to become one."""

    def names(self) -> list[str]:
        """Return the names."""
        ...

    def size(self, name: str) -> int:
        """Return the bytes of a file."""
        ...

    def open(self, name: str) -> BinaryIO:
        """Return a file, open for reading and seekable."""
        ...

    def read(self, name: str, max_bytes: int) -> bytes:
        """Return the whole of a file; FormatError where it is longer."""
        ...


@dataclass(frozen=True)
class Place:
    """A tensor in a file: name of its dtype, sizes, and where its elements begin and end, in bytes of the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def locate(files: Files) -> dict[str, Place]:
    """Return the place of each tensor of ``model.safetensors``, or of the shards that the index names.

    Raises:
        FormatError: neither or both are there, a shard is missing, or index and shards name other tensors.
    """
    names = set(files.names())
    if (MODEL_FILE in names) == (INDEX_FILE in names):
        got = "both" if MODEL_FILE in names else "neither"
        raise FormatError("weights of the model", got=got, expected=f"{MODEL_FILE} or {INDEX_FILE}")
    if MODEL_FILE in names:
        return read_table(files, MODEL_FILE)
    where = _read_index(files)
    if missing := sorted(set(where.values()) - names):
        raise FormatError(f"{INDEX_FILE} names a file that is missing", got=f"{len(missing)} missing")
    places: dict[str, Place] = {}
    for shard in dict.fromkeys(where.values()):
        table = read_table(files, shard)
        if table.keys() != {name for name, file in where.items() if file == shard}:
            raise FormatError(f"{INDEX_FILE} and {shard} name other tensors")
        places |= table
    return {name: places[name] for name in where}


def read_table(files: Files, file: str) -> dict[str, Place]:
    """Return the tensors of one safetensors file, in the order of its header.

    Raises:
        FormatError: a header beyond its limits or not JSON; an unknown dtype; a shape, range and dtype that do not
            agree; ranges that overlap, leave a gap or do not end with the file.
    """
    size = files.size(file)
    with files.open(file) as stream:
        length = int.from_bytes(stream.read(8), "little") if size >= 8 else -1
        if not 2 <= length <= min(MAX_JSON_BYTES, size - 8):
            raise FormatError(f"{file} has no safetensors header", expected=f"at most {MAX_JSON_BYTES} bytes of it")
        header = _load(stream.read(length), file)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{file}: metadata", expected="strings by name")
    places = {name: _place(file, 8 + length, name, row) for name, row in header.items()}
    end = 8 + length
    for place in sorted(places.values(), key=lambda place: (place.start, place.end)):
        if place.start != end:
            raise FormatError(f"{file}: tensors overlap or leave a gap")
        end = place.end
    if end != size:
        raise FormatError(f"{file}: tensors do not fill the file", got=f"{end} bytes", expected=size)
    return places


def _place(file: str, base: int, name: str, row: Any) -> Place:
    if not _NAME.fullmatch(name):
        raise FormatError(f"{file}: name of a tensor", expected="1 to 256 printable ASCII characters, no space")
    if not isinstance(row, dict) or set(row) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{file}: a tensor with other fields", expected="dtype, shape and data_offsets")
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise FormatError(f"{file}: unknown dtype", expected=", ".join(ITEM_BYTES))
    if not _sizes(shape) or len(shape) > MAX_DIMS or not _sizes(offsets) or len(offsets) != 2:
        raise FormatError(f"{file}: shape or offsets of a tensor", expected=f"integers, at most {MAX_DIMS} sizes")
    # Sizes of 0 are taken for 1: an empty tensor of huge sizes takes no memory, but its strides overflow.
    if math.prod(max(1, size) for size in shape) * ITEM_BYTES[dtype] > MAX_TENSOR_BYTES:
        raise FormatError(f"{file}: a tensor is too large", expected=f"at most {MAX_TENSOR_BYTES} bytes")
    if offsets[1] - offsets[0] != math.prod(shape) * ITEM_BYTES[dtype]:
        raise FormatError(f"{file}: a tensor's range is not what its shape and dtype need")
    return Place(file, dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= MAX_TENSOR_BYTES for size in value)


def _read_index(files: Files) -> Mapping[str, str]:
    index = _load(files.read(INDEX_FILE, MAX_JSON_BYTES), INDEX_FILE)
    where = index.get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise FormatError(f"{INDEX_FILE}: weight_map", expected="names of files by names of tensors")
    return where


def _load(data: bytes, what: str) -> dict[str, Any]:
    # Commas and opening brackets bound the number of values before any is made.
    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > MAX_JSON_VALUES:
        raise FormatError(f"{what}: too many values", expected=f"at most {MAX_JSON_VALUES}")
    problem: FormatError | None = None
    value: Any = None
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        problem = FormatError(f"{what} is not JSON", got=f"a {type(error).__name__} in the decoder")
    if problem is not None:  # outside the handler: the decoder's own exception holds the text
        raise problem
    if not isinstance(value, dict):
        raise FormatError(f"{what} is not an object", got=type(value).__name__)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found
