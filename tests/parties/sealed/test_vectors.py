"""The vectors: files made from the document's words, each right or with one fault, and at which stage it is refused."""

import base64
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from obfuscatune.errors import FormatError, SealError
from obfuscatune.parties.identity import Identity
from obfuscatune.parties.sealed import SealedArchive, SealedReader, read_header
from obfuscatune.parties.sealed.tensors import SealedTensors

ROOT = Path(__file__).parents[3]
VECTORS = ROOT / "tests" / "vectors" / "sealed"
NAMES = sorted(path.stem for path in VECTORS.glob("*.txt"))
EXPECTED = {"ok", "format", "length", "signature", "recipient", "payload", "archive", "tensors"}


def load(name: str, tmp_path: Path) -> tuple[str, Path, Identity]:
    head, _, body = (VECTORS / f"{name}.txt").read_text().partition("\n\n")
    fields = dict(line.split(": ", 1) for line in head.splitlines())
    path = tmp_path / "vector.sealed"
    path.write_bytes(base64.b64decode(body))
    return fields["expect"], path, Identity.from_bytes((VECTORS / fields["identity"]).read_bytes(), "vector's identity")


def stage(path: Path, identity: Identity, goal: str) -> tuple[str, FormatError | None]:
    """Where the file is refused; the archive and the tensors are only looked at where the vector is about them."""
    try:
        read_header(path)
    except SealError as error:
        return ("length" if "cut or appended" in error.what else "signature"), error
    except FormatError as error:
        return "format", error
    try:
        reader = SealedReader(path, identity)
    except SealError as error:
        return "recipient", error
    with reader:
        try:
            reader.read(0, reader.payload_bytes)
        except SealError as error:
            return "payload", error
        if goal not in ("archive", "tensors"):
            return "ok", None
        try:
            archive = SealedArchive(reader)
        except FormatError as error:
            return "archive", error
        try:
            SealedTensors(archive)
        except FormatError as error:
            return "tensors", error
    return "ok", None


@pytest.mark.parametrize("name", NAMES)
def test_vector(name: str, tmp_path: Path) -> None:
    expect, path, identity = load(name, tmp_path)
    found, error = stage(path, identity, expect)
    assert found == expect, error
    assert expect in EXPECTED and name.startswith(f"{expect}_")
    if error is not None:
        assert "a test payload" not in str(error)
        with pytest.raises(FormatError), SealedReader(path, identity) as reader:  # the same by the other door
            reader.read(0, reader.payload_bytes)
            SealedTensors(SealedArchive(reader))


def test_every_stage_has_vectors() -> None:
    assert {name.split("_")[0] for name in NAMES} == EXPECTED


def test_right_vectors_hold_what_was_sealed(tmp_path: Path) -> None:
    payloads = {
        "ok_one_chunk": b"a test payload",
        "ok_two_chunks": bytes(range(256)) * 17,
        "ok_whole_chunk": bytes(range(256)) * 16,
        "ok_hybrid": b"a test payload",
        "ok_terms": b"a test payload",
    }
    for name, payload in payloads.items():
        _, path, identity = load(name, tmp_path)
        with SealedReader(path, identity) as reader:
            assert reader.read(0, reader.payload_bytes) == payload
            assert reader.sender.name == "test-only-lab"
            assert reader.terms == ({"purpose": "research", "max_epochs": 3} if name == "ok_terms" else None)
    _, path, identity = load("ok_model", tmp_path)
    with SealedReader(path, identity) as reader:
        tensors = SealedTensors(SealedArchive(reader))
        assert bytes(tensors.get("a").tolist() + tensors.get("b").tolist()) == b"xyz"


def test_the_other_recipient_of_a_hybrid_file_opens_it_too(tmp_path: Path) -> None:
    _, path, _ = load("ok_hybrid", tmp_path)
    hybrid = Identity.from_bytes((VECTORS / "test-only-hybrid.key").read_bytes(), "vector's identity")
    with SealedReader(path, hybrid) as reader:
        assert reader.read(0, reader.payload_bytes) == b"a test payload"


def test_the_document_names_every_vector_and_no_other() -> None:
    text = (ROOT / "docs" / "sealed-format.md").read_text()
    named = set(re.findall(rf"`((?:{'|'.join(EXPECTED)})_\w+)`", text))
    assert named - {"payload_bytes"} == set(NAMES)  # a field of the header has such a name too


def test_the_tool_makes_these_vectors(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_sealed_vectors", ROOT / "tools" / "make_sealed_vectors.py")
    assert spec is not None and spec.loader is not None
    tool: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    lab, clinic, other = (Identity.generate(name, "x25519") for name in ("test-only-lab", "clinic", "other"))
    made = tool.make(lab, clinic, other, Identity.generate("hybrid"))
    assert sorted(made) == NAMES
    for name, (expect, _, data) in made.items():  # fresh keys, the same verdicts
        path = tmp_path / name
        path.write_bytes(data)
        assert stage(path, clinic, expect)[0] == expect, name
