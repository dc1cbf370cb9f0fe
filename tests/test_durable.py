"""Files of their owner alone: the mode is there from the beginning, links are not followed, no half file stays."""

import os
from pathlib import Path

import pytest

from obfuscatune import durable
from obfuscatune.durable import private, write_new, write_private


@pytest.fixture(autouse=True)
def open_umask() -> object:
    """No umask, so that a mode is the one that was asked for."""
    before = os.umask(0)
    yield
    os.umask(before)


def test_a_new_file_is_private_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    write_new(path, b"first")
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"first", 0o600)
    with pytest.raises(FileExistsError):
        write_new(path, b"second")
    assert path.read_bytes() == b"first"
    write_new(tmp_path / "public", b"", mode=0o644)
    assert (tmp_path / "public").stat().st_mode & 0o777 == 0o644


def test_what_is_written_over_another_file_is_private_too(tmp_path: Path) -> None:
    path = tmp_path / "state.new"  # as a crash may have left it, or somebody who can write into the directory
    path.write_bytes(b"before, and longer")
    path.chmod(0o666)
    write_private(path, b"secret")
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"secret", 0o600)
    link = tmp_path / "link"
    link.symlink_to(path)
    write_private(link, b"other")
    assert not link.is_symlink() and path.read_bytes() == b"secret"


def test_nothing_is_left_of_a_file_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(durable.os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_new(tmp_path / "secret", b"data")
    assert list(tmp_path.iterdir()) == []


def test_the_opener_makes_private_files_and_follows_no_link(tmp_path: Path) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    with open(path, "wb", opener=private) as file:
        file.write(b"data")
    assert path.stat().st_mode & 0o777 == 0o600
    link.symlink_to(path)
    with pytest.raises(OSError, match="symbolic link"), open(link, "ab", opener=private):
        pass
    assert path.read_bytes() == b"data"
