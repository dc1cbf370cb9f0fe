"""Places to write to, tried before the work that they are for."""

import tempfile
from pathlib import Path

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


def check_new_file(path: Path | None) -> None:
    """Refuse an ``--output_file`` that is there already, or could not be written.

    Raises:
        UsageError: naming the option.
    """
    if path is None:
        return
    where = f"--output_file {path}"
    if path.exists() or not path.parent.is_dir():
        raise UsageError("file is there already" if path.exists() else "no such directory", where=where)
    check_writable(path.parent, where)
