"""Result files that are whole or not there: written beside, then renamed."""

import os
from pathlib import Path

from obfuscatune.errors import ObfuscatuneError


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, replacing what is there; missing directories are made. Raises ObfuscatuneError."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_bytes(data)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise ObfuscatuneError("cannot write the results", got=error.strerror, where=str(path)) from error


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode())
