"""Figures in one style, as PNG for documents and SVG for pages."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.figure import Figure

from obfuscatune.studies.reports.files import write_bytes

# Okabe and Ito's colours, which the colour-blind tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")
STYLE: Any = {
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dde2ea",
    "font.size": 9,
    "legend.frameon": False,
    "figure.dpi": 150,
    # The same figure gives the same bytes, and text stays text.
    "svg.hashsalt": "obfuscatune",
    "svg.fonttype": "none",
}


@contextmanager
def style() -> Iterator[None]:
    """Draw in the project's style; to be around the making of the figure and its axes."""
    with matplotlib.rc_context(STYLE):
        yield


def new_figure(width: float = 7.0, height: float = 3.2) -> Figure:
    """Return an empty figure, in inches; inside `style`, without a window and without pyplot's global state."""
    return Figure(figsize=(width, height), layout="constrained")


def render(figure: Figure, kind: str) -> bytes:
    """Return the figure as ``png`` or ``svg``; the same figure gives the same bytes."""
    metadata = {"png": {"Software": None}, "svg": {"Date": None}}[kind]
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format=kind, metadata=metadata)
    return buffer.getvalue()


def save(figure: Figure, path: Path) -> None:
    """Write ``path`` with the suffixes ``.png`` and ``.svg``."""
    for kind in ("png", "svg"):
        write_bytes(path.with_suffix(f".{kind}"), render(figure, kind))
