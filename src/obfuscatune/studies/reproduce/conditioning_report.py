"""What `conditioning` found, as tables, a figure and a page, with the sentences that the numbers themselves support."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from obfuscatune.studies.reports.figures import COLOURS, new_figure, style
from obfuscatune.studies.reports.report import write_report
from obfuscatune.studies.reports.tables import write_csv
from obfuscatune.studies.reproduce.keyed import GAUSSIAN, NONE
from obfuscatune.studies.reproduce.lesson import Lesson
from obfuscatune.studies.reproduce.one_layer import DTYPE_NAMES, EXPECTED, EXPECTED_WIDTH

Row = dict[str, Any]
Results = dict[str, list[tuple[Row, Row]]]  # measurement -> (what, value) of each cell

TITLE = "Condition number of the keys (Table 2)"
CHANCE = 0.25
_AT_END = 8192.0  # where a figure puts Gaussian keys, which have no prescribed condition number
# Fewer of 1,024 positions than one in a thousand change: less than float32 itself changes between two machines.
_SAME_TOP1 = 0.999


def write_study(directory: Path, results: Results, lesson: Lesson, provenance: Row) -> Path:
    """Write ``conditioning*.csv``, ``conditioning.md``, the figure and ``conditioning.html``; return the Markdown."""
    inference, training = inference_rows(results["inference"]), training_rows(results["training"])
    layers, checks = layer_rows(results["layer"]), check_rows(results["two processes"], inference)
    with style():
        plot = draw(inference, training)
    tables = {"inference": inference, "training": training, "layer": layers, "processes": checks}
    for name, rows in tables.items():
        write_csv(directory / f"conditioning-{name}.csv", rows)
    notes = [*_about(lesson), *findings(inference, training, checks)]
    shown = {
        "Inference": inference,
        f"Training through the keys, {lesson.steps} steps": training,
        "One linear layer: relative error beside what was expected": layers,
        "One process and two": checks,
    }
    return write_report(directory / "conditioning", TITLE, notes, shown, {"": plot}, provenance)


def inference_rows(cells: list[tuple[Row, Row]]) -> list[Row]:
    """One row for keys, dtype and precision of the keys: means over draws of the keys, the largest of the errors."""
    return [
        {
            **what,
            "draws": len(values),
            "logits error": _mean(values, "error"),
            "largest": max(value["largest"] for value in values),
            "top-1": _mean(values, "top1"),
            "perplexity": _mean(values, "perplexity"),
            "in float64": values[0]["reference_perplexity"],
            "accuracy": _mean(values, "accuracy"),
        }
        for what, values in _grouped(cells)
    ]


def training_rows(cells: list[tuple[Row, Row]]) -> list[Row]:
    """One row for keys, side of the adapter and dtype: mean and lowest accuracy over seeds, and the last losses."""
    return [
        {
            **what,
            "seeds": len(values),
            "accuracy": _mean(values, "accuracy"),
            "lowest": min(value["accuracy"] for value in values),
            "last loss": statistics.fmean(value["losses"][-1] for value in values),
        }
        for what, values in _grouped(cells)
    ]


def layer_rows(cells: list[tuple[Row, Row]]) -> list[Row]:
    """One row for the keys: ours with the keys' products in float32, then all in the dtype, then what is expected."""
    rows = []
    for what, value in cells:
        row = {**what, "condition": value["condition"]}
        for dtype in DTYPE_NAMES:
            row[dtype] = value["errors"][dtype]["float32"]
            if dtype != "float32":
                row[f"{dtype}, keys too"] = value["errors"][dtype]["same"]
        expected = EXPECTED.get(what["keys"], {}) if what["width"] == EXPECTED_WIDTH else {}
        rows.append({**row, **{f"expected, {name}": expected.get(name) for name in ("float32", "bfloat16")}})
    return rows


def check_rows(cells: list[tuple[Row, Row]], inference: Sequence[Row]) -> list[Row]:
    """One row for keys and dtype: the error of `keyed` in one process, and that of `protect` in two, of other draws."""
    alone = {(row["keys"], row["dtype"]): row for row in inference if row["key precision"] == "float32"}
    rows = []
    for what, values in _grouped(cells):
        one = alone[what["keys"], what["dtype"]]
        both = {"one process": one["logits error"], "two processes": _mean(values, "error")}
        ratio = both["two processes"] / both["one process"]
        top1 = {"top-1, one": one["top-1"], "top-1, two": _mean(values, "top1")}
        rows.append({**what, "draws": len(values), **both, "ratio": ratio, **top1})
    return rows


def findings(inference: Sequence[Row], training: Sequence[Row], checks: Sequence[Row]) -> list[str]:
    """Return what the numbers say, in sentences; each is conditional on them."""
    notes = []
    for dtype in dict.fromkeys(row["dtype"] for row in inference):
        rows = [row for row in inference if row["dtype"] == dtype and row["key precision"] == "float32"]
        plain = next(row for row in rows if row["keys"] == NONE)
        worst = max(rows, key=lambda row: math.inf if math.isnan(row["logits error"]) else row["logits error"])
        same = all(row["top-1"] >= _SAME_TOP1 and row["accuracy"] == plain["accuracy"] for row in rows)
        verdict = (
            "no loss in inference under any of the keys: the likeliest token and the accuracy are those without keys"
            if same
            else f"top-1 agreement goes from {plain['top-1']:.3f} without keys to {worst['top-1']:.3f}, "
            f"accuracy from {plain['accuracy']:.3f} to {worst['accuracy']:.3f}"
        )
        notes.append(
            f"{dtype}: {verdict}; the logits' error grows from {plain['logits error']:.1e} to "
            f"{worst['logits error']:.1e} (keys: {worst['keys']})."
        )
    for row in training:
        twin = next((r for r in training if _training_key(r) == (row["keys"], "enclave", row["dtype"])), None)
        if row["adapter"] == "worker" and row["keys"] == GAUSSIAN and twin is not None:
            notes.append(
                f"{row['dtype']}, Gaussian keys: training reaches {row['accuracy']:.3f} with the adapter in keyed "
                f"coordinates on the worker, {twin['accuracy']:.3f} with it in plain coordinates in the enclave."
            )
    if checks:
        low, high = min(row["ratio"] for row in checks), max(row["ratio"] for row in checks)
        notes.append(f"Errors of two processes over those of one, other keys: {low:.2f} to {high:.2f}.")
    return notes


def _about(lesson: Lesson) -> list[str]:
    return [
        "The cells of the paper's own Table 2 are not known to us; its claim is that the error grows with the "
        "condition number and that arbitrary random matrices lose accuracy.",
        "Profile paper: an input key on q,k,v and up, an output key on the two layers after them. Every product in the "
        "dtype has float32 sums; the keys' own products are in float32, or in the dtype too where 'key precision' is "
        "'same', since the paper does not say.",
        "'logits error' is relative, against the model without keys in float64. 'accuracy' is that of the model taught "
        f"{lesson.facts} bundled records without keys in float32, then keyed; {CHANCE} is chance.",
        "Training: 'worker' trains the factors by AdamW in keyed coordinates, as the paper places them; 'enclave' "
        "trains them in plain ones.",
    ]


def draw(inference: Sequence[Row], training: Sequence[Row]) -> Figure:
    """Return error against kappa, perplexity against kappa, and accuracy after training; inside `style`."""
    plot = new_figure(9.6, 3.2)
    errors, perplexities, accuracies = plot.subplots(1, 3)
    for colour, dtype in zip(COLOURS, dict.fromkeys(row["dtype"] for row in inference), strict=False):
        for precision, marker in (("float32", "o-"), ("same", "x:")):
            rows = [r for r in inference if r["dtype"] == dtype and r["key precision"] == precision]
            keyed = [row for row in rows if row["keys"] != NONE]
            if not keyed:
                continue
            label = dtype if precision == "float32" else f"{dtype}, keys too"
            for arbitrary in (False, True):  # Gaussian keys are no further point of the curve
                part = [row for row in keyed if (row["keys"] == GAUSSIAN) == arbitrary]
                at = [_AT_END if arbitrary else float(row["keys"]) for row in part]
                named: Row = {"color": colour, "markersize": 4, "label": None if arbitrary else label}
                errors.loglog(at, [row["logits error"] for row in part], marker, **named)
                ratios = [row["perplexity"] / row["in float64"] for row in part]
                perplexities.semilogx(at, ratios, marker, **named)
            for row in rows:
                if row["keys"] == NONE:
                    errors.axhline(row["logits error"], color=colour, linestyle="--", linewidth=0.8)
    for axes in (errors, perplexities):
        axes.set_xlabel("condition number (dashed: no keys)" if axes is errors else "condition number")
        axes.set_xticks([1, 32, 1024, _AT_END], ["1", "32", "1024", "Gauss"])
        axes.minorticks_off()
    errors.set_ylabel("relative error of the logits")
    errors.legend(fontsize=7)
    perplexities.set_ylabel("perplexity, relative to float64")
    _draw_training(accuracies, training)
    return plot


def _draw_training(axes: Any, training: Sequence[Row]) -> None:
    groups = list(dict.fromkeys((row["keys"], row["adapter"]) for row in training))
    dtypes = list(dict.fromkeys(row["dtype"] for row in training))
    found = {_training_key(row): row["accuracy"] for row in training}
    width = 0.8 / max(len(dtypes), 1)
    for index, (colour, dtype) in enumerate(zip(COLOURS, dtypes, strict=False)):
        at = [place + (index - (len(dtypes) - 1) / 2) * width for place in range(len(groups))]
        axes.bar(at, [found.get((*group, dtype), 0.0) for group in groups], width, color=colour)
    axes.axhline(CHANCE, color="#000000", linestyle=":", linewidth=0.8)
    names = [f"{'Gauss' if keys == GAUSSIAN else keys}\n{side}" for keys, side in groups]
    axes.set_xticks(range(len(groups)), names, fontsize=7)
    axes.set_ylabel("accuracy after training (dotted: chance)")


def _training_key(row: Row) -> tuple[str, str, str]:
    return row["keys"], row["adapter"], row["dtype"]


def _grouped(cells: list[tuple[Row, Row]]) -> list[tuple[Row, list[Row]]]:
    """Gather cells that differ in nothing but the seed."""
    groups: dict[str, tuple[Row, list[Row]]] = {}
    for what, value in cells:
        rest = {name: each for name, each in what.items() if name != "seed"}
        groups.setdefault(repr(rest), (rest, []))[1].append(value)
    return list(groups.values())


def _mean(values: Sequence[Row], name: str) -> float:
    return statistics.fmean(float(value[name]) for value in values)
