"""Unpacking an archive into a new directory: all of it, or nothing."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from obfuscatune.durable import private
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
        beside.rename(directory)
    except OSError as error:
        raise ObfuscatuneError("cannot write the files", got=error.strerror, where=str(directory)) from None
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)  # gone already where it was renamed


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
