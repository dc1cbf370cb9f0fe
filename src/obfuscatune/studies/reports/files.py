"""Result files that are whole or not there: written beside, then renamed."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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


def write_json(path: Path, value: Any) -> None:
    """Write a document for scripts, in a form that a diff can show. Raises as `write_bytes`."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write one value a line. Raises as `write_bytes`."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
