"""Files for their owner alone, and writes that a crash leaves whole: beside, to the disk, renamed, directory too."""

import os
from pathlib import Path


def private(path: str | os.PathLike[str], flags: int) -> int:
    """Open as `os.open` does, and as an ``opener`` of `open`: a file that is made has mode 0600; follows no link."""
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def write_private(path: Path, data: bytes) -> None:
    """Write a file as `write_new`, of mode 0600, in place of what is there; follows no link. Raises OSError."""
    path.unlink(missing_ok=True)  # what a crash has left, or somebody else: its mode stays, and who has it open
    write_new(path, data)


def write_new(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Write a file that is not there yet; it has ``mode`` from its beginning, and no part of it is left after an error.

    Raises:
        OSError: the disk refuses; FileExistsError where something is there already, which stays as it is.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        _write(handle, data)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _write(handle: int, data: bytes) -> None:
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
