"""Small files of the parties, read whole."""

import os
from pathlib import Path

from obfuscatune.errors import UsageError


def read_small(path: Path, max_bytes: int, what: str, *, private: bool = False) -> bytes:
    """Read a whole small file.

    Raises:
        UsageError: it cannot be read, is longer than ``max_bytes``, or is ``private`` and readable by others.
    """
    try:
        with path.open("rb") as file:
            if private and os.fstat(file.fileno()).st_mode & 0o077:
                hint = f"chmod 600 {path}, and think about who has read it"
                raise UsageError(f"{what} is readable by others", where=str(path), hint=hint)
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise UsageError(f"cannot read the {what}", got=error.strerror, where=str(path)) from None
    if len(data) > max_bytes:
        raise UsageError(f"{what} is too long", expected=f"at most {max_bytes} bytes", where=str(path))
    return data
