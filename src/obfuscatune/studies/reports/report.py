"""A study's report: the same tables, notes and figures as Markdown and as a page, with where they come from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from obfuscatune.studies.reports.figures import save
from obfuscatune.studies.reports.page import Section, figure, paragraphs, rows_table, write_page
from obfuscatune.studies.reports.tables import Row, write_markdown


def write_report(
    path: Path,
    title: str,
    notes: Sequence[str],
    tables: Mapping[str, Sequence[Row]],
    figures: Mapping[str, Figure],
    provenance: Mapping[str, Any],
) -> Path:
    """Write ``path`` with the suffixes ``.md`` and ``.html``, and the figures; return the path of the Markdown.

    Args:
        path: without a suffix.
        tables: by their headings, the main one first; those without rows are left out.
        figures: by what follows the name in their files' names, ``""`` or ``-tokens``.

    Raises:
        ObfuscatuneError: the disk refuses.
    """
    for suffix, plot in figures.items():
        save(plot, path.with_name(f"{path.name}{suffix}"))
    (_, main), *others = tables.items()
    markdown = path.with_suffix(".md")
    write_markdown(markdown, title, main, notes, provenance, {heading: rows for heading, rows in others if rows})
    sections = [
        Section("What it shows", paragraphs(notes) + "".join(map(figure, figures.values()))),
        *(Section(heading, rows_table(rows)) for heading, rows in tables.items() if rows),
    ]
    write_page(path.with_suffix(".html"), title, sections, provenance)
    return markdown
