"""The paper's Table 1: accuracy of four tasks after fine-tuning, unprotected and by each method, from the same seeds.

A cell is one trial (`trial`): a model, a task, a method, a dtype and a seed. Cells are cached below the output
directory, and a report is made of all of them.
"""

import os
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch

from obfuscatune.errors import UsageError
from obfuscatune.studies.bench.run import parse_profile
from obfuscatune.studies.bundled import model_directory
from obfuscatune.studies.bundled.records import ATTRIBUTES, company_records
from obfuscatune.studies.device import check_device
from obfuscatune.studies.reports.files import write_json_lines
from obfuscatune.studies.reports.provenance import describe, digest_files
from obfuscatune.studies.reproduce.accuracy_report import write_study
from obfuscatune.studies.reproduce.cells import Cell, CellCache, Value, run_cells
from obfuscatune.studies.reproduce.presets import BUNDLED, RECORDS, UNPROTECTED, Preset, choose
from obfuscatune.studies.reproduce.trial import Trial, run_trial
from obfuscatune.studies.tasks.catalogue import TASKS, require_harness
from obfuscatune.training.loading import load_config

Row = dict[str, Any]

_FACTS = 32
_MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja")


def run(
    preset: str,
    output_dir: Path,
    *,
    data_dir: Path | None = None,
    models: Sequence[str] = (),
    sizes: Sequence[str] = (),
    tasks: Sequence[str] = (),
    methods: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    seeds: Sequence[int] = (),
    no_dropout: bool = False,
    device: str = "cpu",
    workers: int | None = None,
    memory_gb: float | None = None,
    command: Sequence[str] | None = None,
) -> Path:
    """Compute the cells that are not in ``output_dir/cells``, write tables, figures and page; return the Markdown.

    Args:
        preset and the options after it: see `presets.choose`. data_dir: of local JSONL; the hub where None.
        device: of unprotected runs, and of the workers. workers: cells at a time, by default as the cores allow.
        memory_gb: of all cells together, what is free by default.

    Raises:
        UsageError: options, data, device or a model do not fit. ObfuscatuneError: a cell failed; the others are kept.
    """
    require_harness()
    check_device(device)
    chosen = choose(
        preset,
        models=tuple(models),
        sizes=tuple(sizes),
        tasks=tuple(tasks),
        methods=tuple(methods),
        dtypes=tuple(dtypes),
        seeds=tuple(seeds),
        no_dropout=no_dropout,
    )
    planned = plan(chosen, output_dir, data_dir, device)
    cells = [cell for _, cell in planned]
    cache = CellCache(output_dir / "cells")
    at_once = workers or max(1, (os.cpu_count() or 1) // cells[0].inputs["trial"]["threads"])
    values = run_cells(cells, cache, workers=at_once, memory_gb=memory_gb)
    provenance = {
        **describe(command, seeds=chosen.seeds, device=device),
        "lm_eval": version("lm-eval"),
        "preset": preset,
        "cells at a time": at_once,
        "cells of commits": cache.commits(cells),
    }
    return write_study(output_dir, [_result(*each) for each in zip(planned, values, strict=True)], provenance)


def plan(preset: Preset, output_dir: Path, data_dir: Path | None, device: str) -> list[tuple[Row, Cell]]:
    """Return what each cell is, by the columns of the tables, and the cell.

    Raises:
        UsageError: a model or a data directory that is not there.
    """
    records = write_records(output_dir / RECORDS)
    common: Row = {"versions": {"lm-eval": version("lm-eval")}}
    if torch.device(device).type == "cuda":
        common["accelerator"] = torch.cuda.get_device_name(device)
    digests: dict[Path, str] = {}
    planned: dict[str, tuple[Row, Cell]] = {}
    for label, name in preset.models.items():
        model = str(model_directory()) if name == BUNDLED else name
        config = load_config(model)
        digest, memory = digest_model(model, config), _memory_gb(config)
        for what in combinations(preset):
            trial = _trial(preset, what, device)
            rows = records if what["task"] == RECORDS else data_dir
            profile = None if trial.method is None else parse_profile(trial.method).switches()
            data = digest_data(trial.task, rows, digests)
            cell = Cell(
                label=" ".join([label, *map(str, what.values())]),
                compute=measure,
                inputs={**common, "trial": trial.to_dict(), "profile": profile, "model": digest, "data": data},
                places={"model": model, "data_dir": None if rows is None else str(rows)},
                memory_gb=memory,
            )
            planned.setdefault(cell.key, ({"model": label, **what}, cell))
    return list(planned.values())


def combinations(preset: Preset) -> Iterator[Row]:
    """Yield task, dtype, seed and method of each trial with one model."""
    for grid in preset.grids:
        for task, dtype, seed, method in product(grid.tasks, grid.dtypes, preset.seeds, grid.methods):
            yield {"task": task, "dtype": dtype, "method": method, "seed": seed}


def measure(inputs: Row, places: Row) -> Value:
    """Return the outcome of one trial; the function of a cell."""
    return run_trial(Trial.from_dict(inputs["trial"]), places["model"], places["data_dir"])


def write_records(directory: Path) -> Path:
    """Write the package's invented records as a SciQ data directory and return it: nothing in it is anybody's.

    A row to learn is a fact in one of its phrasings; the questions ask in words that are in no row.
    """
    rows, questions = company_records(0, _FACTS)
    training = []
    for number, row in enumerate(rows):
        right = row["completion"].strip()
        wrong = [value for _, values, _, _ in ATTRIBUTES if right in values for value in values if value != right]
        asked = {"id": f"row-{number}", "question": row["prompt"], "choices": [right, *wrong[:3]], "answer": 0}
        training.append(asked)
    for name, lines in (("train", training), ("validation", questions)):
        write_json_lines(directory / TASKS["sciq"].folder / f"{name}.jsonl", lines)
    return directory


def digest_model(model: str, config: Any) -> str:
    """Return a digest of a directory's files, or name and commit of a model on the hub."""
    if not Path(model).is_dir():
        return f"{model}@{config._commit_hash}"
    return digest_files(path for pattern in _MODEL_FILES for path in Path(model).glob(pattern))


def digest_data(task: str, data_dir: Path | None, known: dict[Path, str]) -> str:
    """Return a digest of a task's files, or ``hub``: which rows it served is not known here."""
    if data_dir is None:
        return "hub"
    folder = data_dir / TASKS[task].folder
    if not folder.is_dir():
        raise UsageError("no data of the task", got=task, expected=str(folder), hint="--data_dir DIR")
    if folder not in known:
        known[folder] = digest_files(path for pattern in ("*.jsonl", "*.json") for path in folder.glob(pattern))
    return known[folder]


def _trial(preset: Preset, what: Row, device: str) -> Trial:
    task, method = what["task"], what["method"]
    return Trial(
        task="sciq" if task == RECORDS else task,
        method=None if method == UNPROTECTED else method,
        dtype=what["dtype"],
        training=preset.training_of(task, what["seed"]),
        train_rows=preset.train_rows,
        eval_items=preset.task_items.get(task, preset.eval_items),
        eval_batch_size=preset.eval_batch_size,
        no_dropout=preset.no_dropout,
        threads=preset.threads or torch.get_num_threads(),
        device=device,
    )


def _memory_gb(config: Any) -> float:
    """Weights in both processes and as they are keyed, float32, and what interpreters and activations take."""
    parameters = 12 * config.num_hidden_layers * config.hidden_size**2 + config.vocab_size * config.hidden_size
    return float(1.5 + 3 * 4 * parameters / 2**30)


def _result(planned: tuple[Row, Cell], value: Value) -> Row:
    """One cell with all that is known of it."""
    what, cell = planned
    return {**what, **value, "trial": cell.inputs["trial"], "digests": f"{cell.inputs['model']} {cell.inputs['data']}"}
