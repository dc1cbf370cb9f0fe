"""One self-contained HTML report; its parts are those of the demo's page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from obfuscatune.studies.demo.page import Section, figure, page, paragraph, table
from obfuscatune.studies.reports.files import write_text
from obfuscatune.studies.reports.tables import Row, columns, show

__all__ = ["Section", "figure", "paragraph", "rows_table", "write_html"]


def rows_table(rows: Sequence[Row]) -> str:
    """Return the rows of `tables` as an HTML table."""
    names = columns(rows)
    return table(names, [[show(row.get(name)) for name in names] for row in rows])


def write_html(path: Path, title: str, sections: Sequence[Section], provenance: Mapping[str, Any]) -> None:
    """Write the page: figures are inline, nothing is fetched; where the results come from is its last section."""
    origin = table(("what", "value"), [(name, str(value)) for name, value in provenance.items()])
    write_text(path, page(title, [*sections, Section("Provenance", origin)]))
