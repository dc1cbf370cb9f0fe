"""What `accuracy` found, as tables, a figure and a page, with the sentences that the numbers themselves support."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from obfuscatune.studies.reports.figures import COLOURS, new_figure, style
from obfuscatune.studies.reports.report import write_report
from obfuscatune.studies.reports.tables import write_csv
from obfuscatune.studies.reproduce.accuracy_rows import cell_row, flip_rows, paired_rows, summary_rows, table_rows
from obfuscatune.studies.reproduce.presets import NAIVE_INSIDE, RECORDS, UNPROTECTED

Row = dict[str, Any]

TITLE = "Accuracy after fine-tuning (Table 1)"
CLAIM = (
    "The paper claims accuracy within 1 to 2 points of unprotected on every size and task, and a loss for arbitrary "
    "random matrices. The cells of its table are not known to us, so no figure of it stands beside ours."
)


_ROUNDING = 1e-9  # of means of percentages, in points
# Methods that keep the optimizer in plain coordinates: the same predictions, item by item.
EXACT = ("balanced", "shared")


def write_study(directory: Path, results: Sequence[Row], provenance: Mapping[str, Any]) -> Path:
    """Write ``accuracy*.csv``, ``accuracy.md``, the figure and ``accuracy.html``; return the Markdown."""
    summary, paired, flips = summary_rows(results), paired_rows(results), flip_rows(results)
    write_csv(directory / "accuracy.csv", [cell_row(result) for result in results])
    write_csv(directory / "accuracy-summary.csv", summary)
    write_csv(directory / "accuracy-paired.csv", paired)
    if flips:
        write_csv(directory / "accuracy-flips.csv", flips)
    with style():
        plot = draw(summary)
    notes = [CLAIM, *findings(results, summary, paired), *_about(results)]
    tables = {
        "Accuracy, in percent": table_rows(summary),
        "Mean and spread over seeds": summary,
        "Item by item against unprotected, same seed": paired,
        f"Items that {' or '.join(EXACT)} predicts differently in float32": [
            row for row in flips if row["method"] in EXACT and row["dtype"] == "float32"
        ],
    }
    return write_report(directory / "accuracy", TITLE, notes, tables, {"": plot}, provenance)


def findings(results: Sequence[Row], summary: Sequence[Row], paired: Sequence[Row]) -> list[str]:
    """Say what the numbers say: parity first, then each method's distance from unprotected."""
    notes = []
    for dtype, method in itertools.product(dict.fromkeys(row["dtype"] for row in paired), EXACT):
        rows = [row for row in paired if row["method"] == method and row["dtype"] == dtype]
        if rows:
            differ, items = sum(row["differ"] for row in rows), sum(row["items"] for row in rows)
            notes.append(
                f"Parity, {dtype}: under {method} {differ} of {items:,} predictions differ from local PEFT training "
                f"from the same seed, over {len(rows)} runs; the largest change of a log-likelihood is "
                f"{max(row['likelihood'] for row in rows):.2g} nats, of a step's loss "
                f"{max(row['loss'] for row in rows):.2g}."
            )
    for method in dict.fromkeys(row["method"] for row in summary):
        for dtype in dict.fromkeys(row["dtype"] for row in summary):
            rows = [row for row in summary if (row["method"], row["dtype"]) == (method, dtype) and row["points"] != ""]
            if method != UNPROTECTED and rows:
                notes.append(_distance(method, dtype, rows))
    return [*notes, *_causes(summary)]


def _distance(method: str, dtype: str, rows: Sequence[Row]) -> str:
    worst = min(rows, key=lambda row: row["points"])
    within = sum(abs(row["points"]) <= max(row["reference std"], _one_item(row)) for row in rows)
    return (
        f"{method}, {dtype}: between {worst['points']:+.1f} ({worst['model']}, {worst['task']}) and "
        f"{max(row['points'] for row in rows):+.1f} points from unprotected; within the spread of unprotected's seeds, "
        f"or one item, in {within} of {len(rows)} cells; answers cost "
        f"{max(row['nll'] - row['reference nll'] for row in rows):+.2f} nats more at most."
    )


def _one_item(row: Row) -> float:
    """Points of one item of one seed: a mean over seeds cannot be compared more finely. Its rounding is let through."""
    return 100 / (row["items"] * row["seeds"]) + _ROUNDING  # type: ignore[no-any-return]


def _causes(summary: Sequence[Row]) -> list[str]:
    """Tell what naive loses by its precision from what it loses by where its optimizer steps."""
    notes = []
    means = {(row["model"], row["task"], row["dtype"], row["method"]): row["mean"] for row in summary}
    for model, task, dtype, method in means:
        both = [means.get((model, task, dtype, name)) for name in ("naive", UNPROTECTED)]
        if method == NAIVE_INSIDE and None not in both:
            inside = means[model, task, dtype, method]
            notes.append(
                f"{model}, {task}, {dtype}: naive {both[0]:.1f}, the same keys with the adapter in the enclave "
                f"{inside:.1f}, unprotected {both[1]:.1f}. What lies between the first two is AdamW stepping in the "
                "coordinates of an ill-conditioned key; what lies between the last two, the keys' cost in precision."
            )
    return notes


def _about(results: Sequence[Row]) -> list[str]:
    notes = [
        "Same rows, same order, same start of the adapter and same seeds of dropout for every method of a seed. "
        "Unprotected is Hugging Face's own model and Trainer, PEFT's own layers and the harness' own hf model.",
        "± is the standard deviation over seeds. lost and won are items right in unprotected alone and in the method "
        "alone; p is McNemar's exact test of them. Keys are fresh in every run: what is protected is re-derived up to "
        "float rounding.",
        "paper and naive keep LoRA's factors and their optimizer on the worker. AdamW is not invariant to a change of "
        "coordinates, so they agree with unprotected in their means, not item by item.",
    ]
    for method in dict.fromkeys(result["method"] for result in results):
        off = sorted({name for result in results if result["method"] == method for name in result["switched_off"]})
        if off:
            notes.append(f"{method} ran without {', '.join(off)}: it cannot be run on keyed values. Its items are not")
            notes[-1] += " those of an unprotected run with dropout; --no_dropout compares like with like."
    if not any(name for result in results for name in result["switched_off"]):
        notes.append("All dropout is off, so that every method trains alike.")
    if any(result["task"] == "webqs" for result in results):
        notes.append(
            "webqs asks for one greedy answer word for word (exact_match): near 0 for any small model, so its rows say "
            "little but for the predictions' equality."
        )
    if any(result["task"] == RECORDS for result in results):
        notes.append(
            "records are invented facts of the package, asked as SciQ rows (one in four is chance): the task that a "
            "small model learns to the end, where a loss by the method can show."
        )
    seconds = sum(sum(result[f"{part}_seconds"] for part in ("key", "train", "eval")) for result in results)
    return [*notes, f"{len(results)} cells, {seconds / 60:.0f} minutes of computing in them, one after another."]


def draw(summary: Sequence[Row]) -> Figure:
    """Bars of mean accuracy with their spread, a panel for each model and dtype."""
    panels = list(dict.fromkeys((row["model"], row["dtype"]) for row in summary))
    methods = list(dict.fromkeys(row["method"] for row in summary))
    plot = new_figure(8.0, 0.6 + 2.4 * len(panels))
    for axes, panel in zip(plot.subplots(len(panels), squeeze=False).flat, panels, strict=True):
        rows = [row for row in summary if (row["model"], row["dtype"]) == panel]
        tasks = list(dict.fromkeys(row["task"] for row in rows))
        width = 0.8 / len(methods)
        for place, method in enumerate(methods):
            bars = [row for row in rows if row["method"] == method]
            axes.bar(
                [tasks.index(row["task"]) + (place - (len(methods) - 1) / 2) * width for row in bars],
                [row["mean"] for row in bars],
                width,
                yerr=[row["std"] for row in bars],
                color=COLOURS[place % len(COLOURS)],
                label=method,
                error_kw={"linewidth": 0.8},
            )
        axes.set_xticks(range(len(tasks)), tasks)
        axes.set_ylim(0, 100)
        axes.set_ylabel("accuracy, %")
        axes.set_title(", ".join(panel), loc="left")
    plot.axes[0].legend(ncols=3, loc="upper left", fontsize=7)
    return plot
