"""The rows of the accuracy study's tables, out of the results of its cells."""

import json
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from obfuscatune.errors import ObfuscatuneError
from obfuscatune.studies.reproduce.comparison import Comparison, compare, is_right
from obfuscatune.studies.reproduce.presets import UNPROTECTED

Row = dict[str, Any]

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_LAST = 8  # steps whose mean loss is "the last loss"


def metric(result: Row) -> str:
    """Name of the harness' first metric of the cell's task."""
    return "acc" if "acc" in result["metrics"] else "exact_match"


def score(result: Row) -> float:
    """Return that metric in percent.

    Raises:
        ObfuscatuneError: the stored items do not give it: the comparisons would be of something else.
    """
    value = float(result["metrics"][metric(result)])
    items = [is_right(item) for item in result["items"]]
    if abs(value - sum(items) / len(items)) > 1e-9:
        where = f"{result['model']} {result['task']} {result['method']} {result['seed']}"
        raise ObfuscatuneError("items do not add up to the harness' metric", where=where)
    return 100 * value


def cell_row(result: Row) -> Row:
    """Everything of one cell in one row: its settings as JSON, and its predictions, a digit for each item."""
    losses = result["losses"]
    return {
        **_what(result, "seed"),
        "metric": metric(result),
        "items": len(result["items"]),
        "value": result["metrics"][metric(result)],
        "acc_norm": result["metrics"].get("acc_norm"),
        "answer_nll": result["answer_nll"],
        "steps": result.get("steps", result["trial"]["training"]["logging_steps"] * len(losses)),  # of older cells
        "first_loss": losses[0],
        "last_loss": _last_loss(result),
        "key_seconds": result["key_seconds"],
        "train_seconds": result["train_seconds"],
        "eval_seconds": result["eval_seconds"],
        "choices": "".join(_digit(item["choice"]) for item in result["items"]),
        "choices_norm": "".join(_digit(item["choice_norm"]) for item in result["items"]),
        "right": "".join("01"[is_right(item)] for item in result["items"]),
        "switched_off": ", ".join(result["switched_off"]),
        "digests": result["digests"],
        "trial": json.dumps(result["trial"], sort_keys=True),
    }


def summary_rows(results: Sequence[Row]) -> list[Row]:
    """One row for model, task, dtype and method: mean and spread over seeds, and the distance from unprotected."""
    rows = []
    for group in _groups(results, "model", "task", "dtype", "method"):
        scores = [score(result) for result in group]
        reference = _find(results, group[0], method=UNPROTECTED)
        bases = [score(result) for result in reference]
        rows.append(
            {
                **_what(group[0]),
                "metric": metric(group[0]),
                "seeds": len(group),
                "items": len(group[0]["items"]),
                "mean": statistics.fmean(scores),
                "std": _std(scores),
                "points": statistics.fmean(scores) - statistics.fmean(bases) if bases else "",
                "reference std": _std(bases) if bases else "",
                "acc_norm": _mean_norm(group),
                "nll": statistics.fmean(result["answer_nll"] for result in group),
                "reference nll": statistics.fmean(r["answer_nll"] for r in reference) if reference else "",
                "last loss": statistics.fmean(_last_loss(result) for result in group),
                "seconds": statistics.fmean(r["key_seconds"] + r["train_seconds"] + r["eval_seconds"] for r in group),
            }
        )
    return rows


def table_rows(summary: Sequence[Row]) -> list[Row]:
    """The paper's Table 1: a row for model, task and dtype, a column for each method."""
    methods = list(dict.fromkeys(row["method"] for row in summary))
    rows = []
    for group in _groups(summary, "model", "task", "dtype"):
        by_method = {row["method"]: _with_spread(row) for row in group}
        first = {name: group[0][name] for name in ("model", "task", "dtype", "metric", "seeds", "items")}
        rows.append({**first, **{method: by_method.get(method, "") for method in methods}})
    return rows


def _with_spread(row: Row) -> str:
    """The mean, and the deviation of several seeds: one has none."""
    return f"{row['mean']:.1f} ± {row['std']:.1f}" if row["seeds"] > 1 else f"{row['mean']:.1f}"


def paired_rows(results: Sequence[Row]) -> list[Row]:
    """One row for each protected cell with an unprotected one beside it: items that differ, and in whose favour.

    ``between seeds``: items that differ between two unprotected runs, mean over pairs of seeds; what chance alone does.
    """
    rows = []
    for result, reference, comparison in _pairs(results):
        losses = zip(result["losses"], reference["losses"], strict=True)
        rows.append(
            {
                **_what(result, "seed"),
                "items": comparison.items,
                "differ": len(comparison.flips),
                "between seeds": _between_seeds(_find(results, result, method=UNPROTECTED)),
                "lost": comparison.lost,
                "won": comparison.won,
                "p": comparison.p_value,
                "likelihood": comparison.shift,
                "loss": max(abs(a - b) for a, b in losses),
            }
        )
    return rows


def flip_rows(results: Sequence[Row]) -> list[Row]:
    """One row for each item that a method predicts differently; not for naive ones, which differ nearly everywhere."""
    return [
        {
            **_what(result, "seed"),
            "item": flip.id,
            "what": flip.what,
            "margin (nats)": flip.margin,
            "shift (nats)": flip.shift,
        }
        for result, _, comparison in _pairs(results)
        if not result["method"].startswith("naive")
        for flip in comparison.flips
    ]


def _pairs(results: Sequence[Row]) -> Iterator[tuple[Row, Row, Comparison]]:
    for result in results:
        if result["method"] != UNPROTECTED:
            for reference in _find(results, result, method=UNPROTECTED, seed=result["seed"]):
                yield result, reference, compare(reference["items"], result["items"])


def _between_seeds(references: Sequence[Row]) -> float | None:
    counts = [len(compare(a["items"], b["items"]).flips) for i, a in enumerate(references) for b in references[i + 1 :]]
    return statistics.fmean(counts) if counts else None


def _find(results: Sequence[Row], like: Row, **wanted: Any) -> list[Row]:
    """The results of the same model, task and dtype with these fields."""
    same = {name: like[name] for name in ("model", "task", "dtype")} | wanted
    return [result for result in results if all(result[name] == value for name, value in same.items())]


def _groups(rows: Sequence[Row], *names: str) -> list[list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(groups.values())


def _what(result: Row, *more: str) -> Row:
    return {name: result[name] for name in ("model", "task", "dtype", "method", *more)}


def _last_loss(result: Row) -> float:
    return statistics.fmean(result["losses"][-_LAST:])


def _mean_norm(group: Sequence[Row]) -> float | None:
    norms = [result["metrics"].get("acc_norm") for result in group]
    return None if None in norms else 100 * statistics.fmean(norms)


def _std(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _digit(index: int) -> str:
    return _DIGITS[index] if index < len(_DIGITS) else "?"
