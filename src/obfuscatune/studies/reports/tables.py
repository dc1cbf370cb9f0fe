"""Result rows as CSV for scripts and as Markdown for people."""

import csv
import io
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from obfuscatune.studies.reports.files import write_text

Row = Mapping[str, Any]  # column name to str, int, float, bool or None


def columns(rows: Sequence[Row]) -> list[str]:
    """Return the columns of all rows, in the order of their first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def show(value: Any) -> str:
    """Return a value for people: four digits of a float, ``-`` where there is none."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def is_number(value: Any) -> bool:
    """Whether a value belongs to the right of its column."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows with a header; floats with all their digits, so that a reader gets the same numbers."""
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, buffer.getvalue())


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of `write_csv`, all values as text."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def markdown_table(rows: Sequence[Row], right: Collection[str] = ()) -> str:
    """Return a Markdown table; columns of numbers, and those named in ``right``, are set to the right."""
    names = columns(rows)
    numeric = [name in right or all(isinstance(row.get(name), int | float | None) for row in rows) for name in names]
    lines = ["| " + " | ".join(names) + " |"]
    lines.append("|" + "|".join(" ---: " if number else " --- " for number in numeric) + "|")
    for row in rows:
        cells = (show(row.get(name)).replace("|", "\\|").replace("\n", " ") for name in names)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_markdown(
    path: Path,
    title: str,
    rows: Sequence[Row],
    notes: Sequence[str],
    provenance: Mapping[str, Any],
    more: Mapping[str, Sequence[Row]] | None = None,
) -> None:
    """Write a title, a table, notes as a list, further tables by their headings, and where all of it comes from."""
    parts = [f"# {title}", markdown_table(rows), "\n".join(f"- {note}" for note in notes)]
    for heading, others in (more or {}).items():
        parts += [f"## {heading}", markdown_table(others)]
    parts += ["## Provenance", "\n".join(f"- {name}: {_plain(value)}" for name, value in provenance.items())]
    write_text(path, "\n\n".join(part for part in parts if part) + "\n")


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return show(value) if isinstance(value, bool | None) else str(value)
