"""One self-contained HTML page: sections of text, tables and plots as inline SVG; no script, no network."""

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from obfuscatune.studies.reports.figures import render
from obfuscatune.studies.reports.files import write_text
from obfuscatune.studies.reports.tables import Row, columns, is_number, show

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2330; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .3rem; }
table { border-collapse: collapse; margin: .6rem 0; } td, th { padding: .25rem .8rem; text-align: left; }
th { border-bottom: 2px solid #8a94a6; } td { border-bottom: 1px solid #dde2ea; } td.n { text-align: right; }
pre { background: #f3f5f8; padding: .8rem; overflow-x: auto; font-size: .85rem; }
.figure { overflow-x: auto; } .note { border-left: 4px solid #c4572b; padding-left: .8rem; }
"""


@dataclass(frozen=True)
class Section:
    """A heading and what is under it, already HTML."""

    title: str
    body: str


def paragraph(text: str, *, note: bool = False) -> str:
    """Return a paragraph of escaped text; a ``note`` stands out."""
    kind = ' class="note"' if note else ""
    return f"<p{kind}>{html.escape(text)}</p>"


def paragraphs(texts: Iterable[str]) -> str:
    """Return one paragraph for each text."""
    return "".join(map(paragraph, texts))


def preformatted(text: str) -> str:
    """Return escaped text with its line breaks."""
    return f"<pre>{html.escape(text)}</pre>"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table; numbers are set to the right."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def rows_table(rows: Sequence[Row]) -> str:
    """Return the rows of `tables` as an HTML table."""
    names = columns(rows)
    return table(names, [[row.get(name) for name in names] for row in rows])


def _cell(value: Any) -> str:
    kind = ' class="n"' if is_number(value) else ""
    return f"<td{kind}>{html.escape(show(value))}</td>"


def figure(plot: Figure) -> str:
    """Return a figure as inline SVG; its text stays text, so that it can be searched and read aloud."""
    text = render(plot, "svg").decode()
    return f'<div class="figure">{text[text.index("<svg") :]}</div>'


def page(title: str, sections: Sequence[Section]) -> str:
    """Return the whole page."""
    parts = "".join(f"<h2>{html.escape(section.title)}</h2>{section.body}" for section in sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>{parts}</body></html>\n"
    )


def write_page(
    path: Path, title: str, sections: Sequence[Section], provenance: Mapping[str, Any] | None = None
) -> None:
    """Write the page: figures are inline, nothing is fetched; where the results come from is its last section."""
    if provenance is not None:
        origin = table(("what", "value"), [(name, str(value)) for name, value in provenance.items()])
        sections = [*sections, Section("Provenance", origin)]
    write_text(path, page(title, sections))
