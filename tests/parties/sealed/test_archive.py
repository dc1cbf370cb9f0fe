"""Named files in a payload: reading them, names that cannot be trusted, unpacking all or nothing."""

import io
import os
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from obfuscatune.errors import FormatError, ObfuscatuneError, SealError, UsageError
from obfuscatune.parties.sealed import SealedArchive, SealedReader, read_header, seal_files
from obfuscatune.parties.sealed.contents import LENGTH, check_name, decode_contents, encode_contents
from obfuscatune.parties.sealed.extract import extract

FILES: dict[str, Path | bytes] = {"a.txt": os.urandom(9000), "b/empty": b"", "b/c/d.json": b"line one\nline two\n"}


def seal(path: Path, files: Any, party: SimpleNamespace, **more: Any) -> str:
    options = {"kind": "output", "recipients": [party.clinic.public], "chunk_bytes": 4096, **more}
    return seal_files(path, files, sender=party.lab, **options)


@pytest.fixture(scope="module")
def sealed(party: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sealed") / "file.sealed"
    seal(path, FILES, party)
    return path


def test_files_come_back(sealed: Path, party: SimpleNamespace) -> None:
    with SealedReader(sealed, party.clinic) as reader:
        archive = SealedArchive(reader)
        assert archive.names() == list(FILES)
        for name, data in FILES.items():
            assert archive.size(name) == len(data)  # type: ignore[arg-type]
            assert archive.read(name, 9000) == data
        with archive.open("b/c/d.json") as file:
            assert list(file) == [b"line one\n", b"line two\n"]
        with pytest.raises(FormatError, match="too long"):
            archive.read("a.txt", 8999)
        for use in (archive.size, archive.open, lambda name: archive.read(name, 1)):
            with pytest.raises(FormatError, match="no such file"):
                use("nothing")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(
    steps=st.lists(
        st.tuples(st.just("read"), st.integers(0, 10_000))
        | st.tuples(st.just("seek"), st.integers(0, 10_000))
        | st.tuples(st.just("relative"), st.integers(-50, 500))
        | st.tuples(st.just("end"), st.integers(-9000, 10)),
        max_size=8,
    )
)
def test_an_open_file_is_like_one_in_memory(steps: list[tuple[str, int]], sealed: Path, party: SimpleNamespace) -> None:
    with SealedReader(sealed, party.clinic) as reader, SealedArchive(reader).open("a.txt") as file:
        other = io.BytesIO(FILES["a.txt"])  # type: ignore[arg-type]
        assert file.readable() and file.seekable() and not file.writable()
        for step, number in steps:
            if step == "read":
                assert file.read(number) == other.read(number)
            elif step != "relative":
                whence = os.SEEK_SET if step == "seek" else os.SEEK_END
                assert file.seek(number, whence) == other.seek(number, whence)
            elif other.tell() + number >= 0:
                assert file.seek(number, os.SEEK_CUR) == other.seek(number, os.SEEK_CUR)
            assert file.tell() == other.tell()


def test_from_disk_and_memory_alike(tmp_path: Path, party: SimpleNamespace) -> None:
    (tmp_path / "plain").write_bytes(bytes(range(256)) * 20_000)
    digest = seal(tmp_path / "a", {"x": tmp_path / "plain", "y": b"z"}, party, chunk_bytes=1 << 20)
    assert digest == read_header(tmp_path / "a").digest
    with SealedReader(tmp_path / "a", party.clinic) as reader:
        assert SealedArchive(reader).read("x", 1 << 30) == (tmp_path / "plain").read_bytes()


@pytest.mark.parametrize(
    "name",
    [
        *("", "/a", "a/", "a//b", "..", "../a", "a/../b", ".", "./a", ".a", "a/.b"),
        *("a\\b", "a b", "a\0", "a\n", "é", "-a", "a" * 201, "a/b/c/d/e", None, 1),
    ],
)
def test_names_that_cannot_be_trusted_with_a_path(name: Any, tmp_path: Path, party: SimpleNamespace) -> None:
    with pytest.raises(FormatError):
        check_name(name)
    if isinstance(name, str):
        with pytest.raises(FormatError):
            seal(tmp_path / "a", {name: b"x"}, party)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("names", [[], ["a", "A"], ["a", "a/b"], ["A", "a/b"], [f"f{n}" for n in range(4097)]])
def test_sets_of_names_that_are_refused(names: list[str], tmp_path: Path, party: SimpleNamespace) -> None:
    with pytest.raises(FormatError):
        seal(tmp_path / "a", dict.fromkeys(names, b""), party)
    assert not list(tmp_path.iterdir())


@given(st.dictionaries(st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._]{0,5}", fullmatch=True), st.integers(0, 1 << 40)))
def test_contents_round_trip(sizes: dict[str, int]) -> None:
    try:
        data = encode_contents(sizes)
    except FormatError:
        assert not sizes or len({name.lower() for name in sizes}) < len(sizes)
        return
    (length,) = LENGTH.unpack(data[:4])
    assert length == len(data) - 4
    entries = decode_contents(data[4:], len(data) + sum(sizes.values()))
    assert {name: entry.size for name, entry in entries.items()} == sizes
    with pytest.raises(FormatError, match="add up"):
        decode_contents(data[4:], len(data) + sum(sizes.values()) + 1)


@given(st.binary(max_size=60))
def test_arbitrary_contents(data: bytes) -> None:
    with pytest.raises(FormatError):
        decode_contents(data, 1000)


def test_sources_that_cannot_be_sealed(tmp_path: Path, party: SimpleNamespace) -> None:
    (tmp_path / "real").write_bytes(b"x")
    (tmp_path / "link").symlink_to("real")
    for name in ("nowhere", "link", "."):
        with pytest.raises(UsageError):
            seal(tmp_path / "out", {"x": tmp_path / name}, party)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("grows", [True, False])
def test_a_source_that_changes_meanwhile(
    grows: bool, tmp_path: Path, party: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plain").write_bytes(bytes(1000))
    monkeypatch.setattr("obfuscatune.parties.sealed.archive._size", lambda path: 999 if grows else 1001)
    with pytest.raises(UsageError, match="changed while it was sealed"):
        seal(tmp_path / "out", {"x": tmp_path / "plain"}, party)
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_unpacking(sealed: Path, tmp_path: Path, party: SimpleNamespace) -> None:
    with SealedReader(sealed, party.clinic) as reader:
        extract(SealedArchive(reader), tmp_path / "new" / "out")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    found = {path.relative_to(tmp_path / "new/out").as_posix(): path for path in tmp_path.rglob("*") if path.is_file()}
    assert {name: path.read_bytes() for name, path in found.items()} == FILES
    assert {stat.S_IMODE(path.stat().st_mode) for path in found.values()} == {0o600}
    folders = [path for path in (tmp_path / "new").rglob("*") if path.is_dir()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o700}


def test_unpacking_writes_all_or_nothing(sealed: Path, tmp_path: Path, party: SimpleNamespace) -> None:
    path = tmp_path / "changed"
    data = bytearray(sealed.read_bytes())
    data[read_header(sealed).payload_offset + 9000] ^= 1  # in the last chunk, after two that are right
    path.write_bytes(data)
    with SealedReader(path, party.clinic) as reader, pytest.raises(SealError):
        extract(SealedArchive(reader), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["changed"]


@pytest.mark.parametrize("kind", ["directory", "file", "dangling link"])
def test_unpacking_overwrites_nothing(kind: str, sealed: Path, tmp_path: Path, party: SimpleNamespace) -> None:
    out = tmp_path / "out"
    {"directory": out.mkdir, "file": out.touch, "dangling link": lambda: out.symlink_to("nowhere")}[kind]()
    with SealedReader(sealed, party.clinic) as reader, pytest.raises(UsageError, match="there already"):
        extract(SealedArchive(reader), out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_refuses(sealed: Path, tmp_path: Path, party: SimpleNamespace) -> None:
    (tmp_path / "file").touch()
    with SealedReader(sealed, party.clinic) as reader, pytest.raises(ObfuscatuneError, match="cannot write"):
        extract(SealedArchive(reader), tmp_path / "file" / "out")
