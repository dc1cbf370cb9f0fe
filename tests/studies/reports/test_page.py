"""A page: one file, nothing fetched, nothing unescaped."""

import re

from matplotlib.figure import Figure

from obfuscatune.studies.reports.page import Section, figure, page, paragraph, preformatted, table


def test_a_page_needs_nothing_from_elsewhere() -> None:
    plot = Figure()
    plot.subplots().plot([1, 2, 3])
    text = page("title", [Section("plot", figure(plot)), Section("text", paragraph("a < b"))])
    assert text.startswith("<!doctype html>")
    assert "<svg" in text and "<script" not in text
    # Names of XML namespaces are no addresses that a browser fetches; sources and links would be.
    assert not re.search(r"(src|href)=\"https?:", text)
    assert not re.search(r"@import|url\(https?:", text)


def test_content_is_escaped() -> None:
    for body in (paragraph("<b>"), preformatted("<b>"), table(("<b>",), [("<b>", 1)]), page("<b>", [])):
        assert "<b>" not in body and "&lt;b&gt;" in body


def test_a_table_sets_numbers_apart() -> None:
    body = table(("name", "count", "share", "kept"), [("x", 12345, 0.5, True)])
    assert '<td class="n">12,345</td><td class="n">0.5</td><td>yes</td>' in body


def test_the_same_figure_gives_the_same_bytes() -> None:
    def draw() -> str:
        plot = Figure()
        plot.subplots().plot([1, 2, 3])
        return figure(plot)

    assert draw() == draw()
