"""Typed reading of the tables of a policy file, which collects the faults instead of stopping at the first."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from obfuscatune.errors import UsageError
from obfuscatune.parties.files import read_small


class Table:
    """One table. Every method takes a key out of it, and where its value is wrong adds to ``faults``.

    Args:
        fields: of the file. name: of the table, for faults. faults: shared by the tables of a file.
    """

    def __init__(self, fields: Any, name: str, faults: list[str]) -> None:
        self._name, self.faults = name, faults
        if not isinstance(fields, dict):
            self._fault("", "expected a table")
        self._fields: dict[str, Any] = dict(fields) if isinstance(fields, dict) else {}

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    def _fault(self, name: str, text: str) -> None:
        self.faults.append(f"{'.'.join(part for part in (self._name, name) if part)}: {text}")

    def end(self) -> None:
        """Fault what was not taken."""
        for name in self._fields:
            self._fault(name, "unknown key")

    def table(self, name: str) -> "Table":
        """Return the table ``name``; empty where there is none."""
        return Table(self._fields.pop(name, {}), f"{self._name}.{name}".lstrip("."), self.faults)

    def flag(self, name: str) -> bool:
        """Return a boolean, false where there is none."""
        value = self._fields.pop(name, False)
        if type(value) is not bool:
            self._fault(name, "expected true or false")
        return value is True

    def number(self, name: str, allowed: range, default: int | None = None) -> int:
        """Return an integer; without ``default`` it is required."""
        value = self._fields.pop(name, default)
        if type(value) is int and value in allowed:
            return value
        self._fault(name, f"expected a number from {allowed[0]} to {allowed[-1]}")
        return allowed[-1]

    def numbers(self, name: str, allowed: range) -> frozenset[int]:
        """Return a list of at least one integer."""
        values = self._fields.pop(name, None)
        if isinstance(values, list) and values and all(type(value) is int and value in allowed for value in values):
            return frozenset(values)
        self._fault(name, f"expected a list of numbers from {allowed[0]} to {allowed[-1]}")
        return frozenset()

    def words(
        self, name: str, allowed: "Collection[str] | re.Pattern[str]", default: tuple[str, ...]
    ) -> tuple[str, ...]:
        """Return a list of texts, each one of ``allowed`` or matching it."""
        values = self._fields.pop(name, list(default))
        if isinstance(allowed, re.Pattern):
            pattern, form = allowed, f"like {allowed.pattern}"
        else:
            pattern, form = re.compile("|".join(map(re.escape, allowed))), f"of {', '.join(allowed)}"
        if isinstance(values, list) and all(isinstance(value, str) and pattern.fullmatch(value) for value in values):
            return tuple(values)
        self._fault(name, f"expected a list of texts {form}")
        return ()

    def hexes(self, name: str, size: int) -> frozenset[str]:
        """Return a list of texts of ``size`` bytes in hex, made lower case; empty where there is none."""
        values = self._fields.pop(name, [])
        pattern = re.compile(rf"[0-9a-fA-F]{{{2 * size}}}")
        if isinstance(values, list) and all(isinstance(value, str) and pattern.fullmatch(value) for value in values):
            return frozenset(value.lower() for value in values)
        self._fault(name, f"expected a list of texts of {2 * size} hex digits")
        return frozenset()

    def data(self, name: str, folder: Path, max_bytes: int) -> bytes | None:
        """Return the content of a file that is named relative to ``folder``; None where none is."""
        value = self._fields.pop(name, None)
        if value is None:
            return None
        try:
            if isinstance(value, str) and value and "\0" not in value:
                return read_small(folder / value, max_bytes, "file")
            self._fault(name, "expected the name of a file")
        except UsageError as error:
            self._fault(name, f"{error.what} {value!r}")
        return None

    def file(self, name: str, folder: Path, max_bytes: int) -> str | None:
        """Return the text of a file, as `data` its content."""
        data = self.data(name, folder, max_bytes)
        try:
            return None if data is None else data.decode("utf-8")
        except UnicodeDecodeError:
            self._fault(name, "expected a file in UTF-8")
        return None
