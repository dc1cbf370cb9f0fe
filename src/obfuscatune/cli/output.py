"""Places to write to, tried before the work that they are for."""

import fcntl
import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from obfuscatune.errors import UsageError


def check_writable(directory: Path, where: str) -> None:
    """Write a file without a name into a directory, and let it go.

    Raises:
        UsageError: that cannot be done.
    """
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"\0" * 4096)
    except OSError as error:
        raise UsageError("cannot write into the directory", got=error.strerror, where=where) from None


def check_place(directory: Path, where: str) -> None:
    """Refuse a directory for results, which need not be there yet, that could not be written into.

    Raises:
        UsageError: as :func:`check_writable`; it is a file, or below one.
    """
    is_empty(directory, where)
    nearest = next(path for path in (directory, *directory.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir():  # a file, or a link to nowhere
        raise UsageError("not an output directory", got=f"no directory at {nearest}", where=where)
    check_writable(nearest, where)


def check_new_file(path: Path | None, option: str = "--output_file") -> None:
    """Refuse a file to be made, by this option, that is there already, or could not be written.

    Raises:
        UsageError: naming the option.
    """
    if path is None:
        return
    where = f"{option} {path}"
    try:
        path.lstat()  # a link to nowhere is there too
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # a name that is too long, a directory that may not be read
        raise UsageError("cannot write the file", got=error.strerror, where=where) from None
    else:
        raise UsageError("file is there already", where=where)
    check_parent(path, where)


def check_parent(path: Path, where: str) -> None:
    """Refuse a file in a directory that is not there, or could not be written into.

    Raises:
        UsageError: naming ``where``.
    """
    if not path.parent.is_dir():
        raise UsageError("no such directory", where=where)
    check_writable(path.parent, where)


def is_empty(directory: Path, where: str) -> bool:
    """Return whether a directory is not there yet, or has nothing in it.

    Raises:
        UsageError: it is a file, or cannot be looked into.
    """
    try:
        return not directory.exists() or not any(directory.iterdir())
    except NotADirectoryError:
        got = "a file"
    except OSError as error:
        got = str(error.strerror)
    raise UsageError("not an output directory", got=got, where=where)


class OneWriter:
    """A directory for results that one run at a time writes into; a context manager, at whose end others may.

    The lock is the directory's own, so that no file is made for it, and goes with the process however that ends. Where
    the file system has no such locks, as some networks' have none for directories, there is none.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._handle: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def take(self) -> None:
        """Keep others out, from now on, if the directory is there; may be called again when it is, or is another one.

        Raises:
            UsageError: another run writes into it.
        """
        if self._handle is not None:
            if self._is_there(self._handle):
                return
            os.close(self._handle)
            self._handle = None
        try:
            handle = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return  # not there yet; or what is wrong with it is told by whoever writes there
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            hint = "wait for its end, stop it, or choose another --output_dir"
            raise UsageError("another run writes into this directory", where=str(self._directory), hint=hint) from None
        except OSError:
            os.close(handle)
            return
        self._handle = handle

    def _is_there(self, handle: int) -> bool:
        """Return whether the directory is the one that is locked: it may have been removed and made anew meanwhile."""
        try:
            return os.path.samestat(os.fstat(handle), self._directory.stat())
        except OSError:
            return False
