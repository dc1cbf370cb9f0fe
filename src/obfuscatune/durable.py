"""Writes that a crash leaves whole: beside, to the disk, renamed, and the directory to the disk too."""

import os
from pathlib import Path


def write_private(path: Path, data: bytes) -> None:
    """Write a file of mode 0600 that is on the disk when this returns; follows no link. Raises OSError."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        write_all(handle, data)
        os.fsync(handle)
    finally:
        os.close(handle)


def write_all(handle: int, data: bytes) -> None:
    """Write all of ``data`` where the file stands; one call of the system may take a part only. Raises OSError."""
    left = memoryview(data)
    while left:
        left = left[os.write(handle, left) :]


def rename(source: Path, target: Path) -> None:
    """Give ``source`` the name ``target``, replacing what is there, for good. Raises OSError."""
    os.replace(source, target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Bring a file's content, or a directory's names, to the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
