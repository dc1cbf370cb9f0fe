"""Unpacking an archive into a new directory: all of it, or nothing."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from obfuscatune.durable import private, rename, sync
from obfuscatune.errors import ObfuscatuneError, UsageError
from obfuscatune.parties.sealed.archive import COPY_BYTES, SealedArchive, progress_bar


def extract(archive: SealedArchive, directory: Path, *, progress: bool = False) -> None:
    """Write the files of ``archive`` into ``directory``, which must not exist; modes 0700 and 0600.

    They are written into a directory beside it, which is renamed once every byte was verified, and removed otherwise.

    Raises:
        UsageError: ``directory`` is there. SealError: a changed file. ObfuscatuneError: the disk refuses.
    """
    if os.path.lexists(directory):
        raise UsageError("output directory is there already", where=str(directory), hint="nothing is ever overwritten")
    beside: Path | None = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}.", suffix=".part"))
        total = sum(archive.size(name) for name in archive.names())
        with progress_bar("open", total, progress) as bar:
            for name in archive.names():
                _write(archive, name, beside, bar.update)
        for folder in [beside, *(path for path in beside.rglob("*") if path.is_dir())]:
            sync(folder)
        rename(beside, directory)
    except OSError as error:
        raise ObfuscatuneError("cannot write the files", got=error.strerror, where=str(directory)) from None
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)  # gone already where it was renamed


def holds(directory: Path, archive: SealedArchive) -> bool:
    """Return whether ``directory`` has the files of ``archive``, byte by byte, and no others.

    Raises:
        SealError: a changed file. ObfuscatuneError: the directory cannot be read.
    """
    try:
        there = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir()}
        return there == set(archive.names()) and all(_same(archive, name, directory / name) for name in there)
    except OSError as error:
        raise ObfuscatuneError("cannot read the files", got=error.strerror, where=str(directory)) from None


def _same(archive: SealedArchive, name: str, path: Path) -> bool:
    if not path.is_file() or path.stat().st_size != archive.size(name):
        return False
    with archive.open(name) as source, path.open("rb") as file:
        while data := source.read(COPY_BYTES):
            if file.read(COPY_BYTES) != data:
                return False
    return True


def _write(archive: SealedArchive, name: str, root: Path, report: Callable[[int], object]) -> None:
    target = root
    for part in name.split("/")[:-1]:
        target /= part
        target.mkdir(mode=0o700, exist_ok=True)
    path = root / name
    buffer = memoryview(bytearray(min(archive.size(name), COPY_BYTES) or 1))
    with (
        archive.open(name) as source,
        open(path, "xb", opener=private) as file,
    ):
        while count := source.readinto(buffer):
            file.write(buffer[:count])
            report(count)
        file.flush()
        os.fsync(file.fileno())
