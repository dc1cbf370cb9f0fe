"""What a model's ``config.json`` may ask for before a library reads it: a party's file, read in an enclave too.

transformers makes a list of as many items as the file says that there are layers, before anything is compared with the
weights. Widths need no limit here: until the weights are looked at, tensors are made without data.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from obfuscatune.errors import UsageError

MOST_LAYERS = 4096
MOST_BYTES = 1 << 24


def refuse_many_layers(path: Path) -> None:
    """Refuse a configuration that would fill the memory; whatever else is wrong with it is left to its reader.

    Raises:
        UsageError: more than `MOST_LAYERS` layers, or a file of more than `MOST_BYTES`.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UsageError("a model's configuration is too long", expected=f"{MOST_BYTES} bytes", where=str(path))
        fields = json.loads(path.read_bytes())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        return
    counts = [number for name, number in _integers(fields) if "layer" in name or name == "attention_types"]
    most = max(counts, key=abs, default=0)
    if abs(most) > MOST_LAYERS:
        raise UsageError("layers in the model's configuration", got=most, expected=f"at most {MOST_LAYERS}")


def _integers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """All integers of a value from JSON, with the name of the field that each is in."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _integers(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from _integers(inner, name)
    elif type(value) is int:
        yield name, value
