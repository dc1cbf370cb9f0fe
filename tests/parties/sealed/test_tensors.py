"""Tensors of sealed models: equal to the safetensors library's, and headers that lie are refused."""

import io
import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from obfuscatune.errors import FormatError
from obfuscatune.parties.sealed import SealedArchive, SealedReader, seal_files
from obfuscatune.parties.sealed import tensor_table as table
from obfuscatune.parties.sealed.tensors import DTYPES, SealedTensors

INDEX, MODEL = "model.safetensors.index.json", "model.safetensors"


class Memory:
    """Files in memory."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files

    def names(self) -> list[str]:
        return list(self.files)

    def size(self, name: str) -> int:
        return len(self.files[name])

    def open(self, name: str) -> BinaryIO:
        return io.BytesIO(self.files[name])

    def read(self, name: str, max_bytes: int) -> bytes:
        return self.files[name]


def seal(path: Path, files: dict[str, bytes], party: SimpleNamespace) -> None:
    recipients = [party.clinic.public]
    seal_files(path, dict(files), kind="model", sender=party.lab, recipients=recipients, chunk_bytes=4096)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def random_tensors() -> dict[str, torch.Tensor]:
    found = {
        f"layer.{name}": torch.randint(0, 256, (3, 5 * dtype.itemsize), dtype=torch.uint8).view(dtype)
        for name, dtype in DTYPES.items()
        if name != "BOOL"
    }
    found["mask"] = torch.rand(7, 2) > 0.5
    return found | {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "long": torch.randn(50, 40)}


def test_every_dtype_against_the_library(tmp_path: Path, party: SimpleNamespace) -> None:
    tensors = random_tensors()
    save_file(tensors, tmp_path / MODEL, metadata={"format": "pt"})
    seal(tmp_path / "sealed", {MODEL: (tmp_path / MODEL).read_bytes(), "config.json": b"{}"}, party)
    with SealedReader(tmp_path / "sealed", party.clinic) as reader:
        found = SealedTensors(SealedArchive(reader))
        assert set(found.names()) == set(tensors)
        for name, tensor in tensors.items():
            assert (found.shape(name), found.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
            assert same(found.get(name), tensor), name
        assert not same(found.get("long"), tensors["long"] + 1)  # the control
        with pytest.raises(FormatError, match="no such tensor"):
            found.get("nothing")


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.from_regex(r"[a-z.]{1,6}", fullmatch=True),
        st.tuples(
            st.lists(st.integers(0, 5), max_size=4), st.sampled_from([torch.float32, torch.bfloat16, torch.int8])
        ),
        min_size=1,
        max_size=5,
    )
)
def test_tables_of_the_library(shapes: dict[str, tuple[list[int], torch.dtype]]) -> None:
    data = save({name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()})
    places = table.read_table(Memory({MODEL: data}), MODEL)
    assert {name: (list(place.shape), DTYPES[place.dtype]) for name, place in places.items()} == shapes


def test_shards(tmp_path: Path, party: SimpleNamespace) -> None:
    tensors = {f"t{number}": torch.randn(40, 40) for number in range(5)}
    shards = {"model-00001-of-00002.safetensors": ["t0", "t3"], "model-00002-of-00002.safetensors": ["t1", "t2", "t4"]}
    where = {name: file for file, names in shards.items() for name in names}
    files = {file: save({name: tensors[name] for name in names}) for file, names in shards.items()}
    files[INDEX] = json.dumps({"metadata": {"total_size": 1}, "weight_map": where}).encode()
    seal(tmp_path / "sealed", files, party)
    with SealedReader(tmp_path / "sealed", party.clinic) as reader:
        found = SealedTensors(SealedArchive(reader))
        assert set(found.names()) == set(tensors)
        assert all(same(found.get(name), tensor) for name, tensor in tensors.items())
    for change in (
        {**where, "t9": "model-00001-of-00002.safetensors"},
        {name: file for name, file in where.items() if name != "t1"},
        {**where, "t0": "model-00002-of-00002.safetensors"},
        {**where, "t0": "nowhere"},
        {**where, "t0": 1},
        {},
        None,
    ):
        with pytest.raises(FormatError):
            table.locate(Memory({**files, INDEX: json.dumps({"weight_map": change}).encode()}))


def file_of(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def row(start: Any, end: Any, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no safetensors header"),
        (b"\2\0\0", "no safetensors header"),
        (struct.pack("<Q", 1 << 63) + b"{}", "no safetensors header"),
        (struct.pack("<Q", 1) + b"{", "no safetensors header"),
        (file_of(b"[]"), "no object|not an object"),
        (file_of(b"{]"), "not JSON"),
        (file_of(b"[" * 20_000), "not JSON"),
        (file_of(b'{"a":' + b"9" * 5000 + b"}"), "not JSON"),
        (file_of(b"\xff\xff"), "not JSON"),
        (file_of({"a": 1}), "other fields"),
        (file_of({"a": {**row(0, 1), "x": 1}}, b"x"), "other fields"),
        (file_of({"a": row(0, 1, dtype="F4")}, b"x"), "unknown dtype"),
        (file_of({"a": row(0, 1, dtype=["U8"])}, b"x"), "unknown dtype"),
        (file_of({"a": row(0, 1, shape="x")}, b"x"), "shape or offsets"),
        (file_of({"a": row(0, 1, shape=[1.0])}, b"x"), "shape or offsets"),
        (file_of({"a": row(0, 1, shape=[True])}, b"x"), "shape or offsets"),
        (file_of({"a": row(0, 1, shape=[1] * 9)}, b"x"), "shape or offsets"),
        (file_of({"a": row(0, 1, shape=[1 << 41, 0])}, b"x"), "shape or offsets"),
        (file_of({"a": {**row(0, 1), "data_offsets": [0]}}, b"x"), "shape or offsets"),
        (file_of({"a": row(0, 0, shape=[0, 1 << 30, 1 << 30])}), "too large"),
        (file_of({"a": row(0, 4, shape=[2], dtype="F32")}, b"1234"), "range is not what"),
        (file_of({"a": row(2, 1, shape=[])}, b"xy"), "range is not what"),
        (file_of({"": row(0, 1)}, b"x"), "name of a tensor"),
        (file_of({"a" * 257: row(0, 1)}, b"x"), "name of a tensor"),
        (file_of({"a": row(0, 2), "b": row(1, 3)}, b"xyz"), "overlap or leave a gap"),
        (file_of({"a": row(0, 2), "b": row(0, 2)}, b"xy"), "overlap or leave a gap"),
        (file_of({"a": row(1, 2)}, b"xy"), "overlap or leave a gap"),
        (file_of({"a": row(0, 1)}, b"xy"), "do not fill"),
        (file_of({"a": row(0, 3)}, b"xy"), "do not fill"),
        (file_of({"__metadata__": {"a": 1}}), "metadata"),
    ],
)
def test_headers_that_lie(data: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        table.read_table(Memory({MODEL: data}), MODEL)


def test_too_many_values_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("parsed"))
    for text in (b'{"a":[' + b"[]," * (1 << 20) + b"[]]}", b"[" * ((1 << 20) + 1)):
        with pytest.raises(FormatError, match="too many values"):
            table.read_table(Memory({MODEL: file_of(text)}), MODEL)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["U8", "F32"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(st.binary(max_size=60) | st.dictionaries(st.text(max_size=3), json_values, max_size=3), st.binary(max_size=8))
def test_arbitrary_headers(header: Any, data: bytes) -> None:
    try:
        places = table.read_table(Memory({MODEL: file_of(header, data)}), MODEL)
    except FormatError:
        return
    assert sum(place.end - place.start for place in places.values()) == len(data)


@given(st.binary(max_size=40))
def test_arbitrary_indexes(data: bytes) -> None:
    with pytest.raises(FormatError):
        table.locate(Memory({INDEX: data, "a": b""}))


@pytest.mark.parametrize("names", [[], ["other.safetensors"], [MODEL, INDEX]])
def test_weights_that_are_not_where_they_should_be(names: list[str]) -> None:
    with pytest.raises(FormatError, match="weights of the model"):
        table.locate(Memory(dict.fromkeys(names, b"")))


def test_a_bool_that_is_none(tmp_path: Path, party: SimpleNamespace) -> None:
    seal(tmp_path / "sealed", {MODEL: file_of({"a": row(0, 2, dtype="BOOL")}, b"\1\2")}, party)
    with SealedReader(tmp_path / "sealed", party.clinic) as reader, pytest.raises(FormatError, match="neither 0 nor 1"):
        SealedTensors(SealedArchive(reader)).get("a")
