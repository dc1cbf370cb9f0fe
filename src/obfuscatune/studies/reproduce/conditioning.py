"""The paper's Table 2: what the condition number of the keys costs, in float32, bfloat16 and float16.

The cells of the paper's own table are not known to us; its claim is that the error grows with the condition number and
that arbitrary random matrices lose accuracy. The paper does not say in which precision, nor where the optimizer's
coordinates are. So both are varied here: four measurements on one model, each cell cached.

=============  =====================================================================================================
layer          one random linear layer: relative error
inference      the model under keys, one process (`keyed`): logits against float64, perplexity, top-1, accuracy
two processes  the same through `protect`, where it takes the dtype: a check that the one-process form is what runs
training       LoRA taught through the keys: factors on the worker in keyed coordinates, or in plain ones inside
=============  =====================================================================================================
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from obfuscatune.errors import UsageError
from obfuscatune.studies.bundled import model_directory
from obfuscatune.studies.device import check_device
from obfuscatune.studies.reports.provenance import describe, digest_files
from obfuscatune.studies.reproduce import conditioning_cells as compute
from obfuscatune.studies.reproduce.cells import Cell, CellCache, run_cells
from obfuscatune.studies.reproduce.conditioning_report import write_study
from obfuscatune.studies.reproduce.fidelity import read_text, text_windows
from obfuscatune.studies.reproduce.keyed import GAUSSIAN, NONE
from obfuscatune.studies.reproduce.lesson import Lesson
from obfuscatune.studies.reproduce.one_layer import DTYPE_NAMES, UNIFORM
from obfuscatune.training.encoding import check_embedded, vocabulary_of
from obfuscatune.training.loading import load_config, load_tokenizer

Row = dict[str, Any]

SWEEP = (NONE, "1", "2", "8", "32", "128", "160", "1024", GAUSSIAN)
_PROTECTED_DTYPES = ("float32", "bfloat16")  # protect() refuses float16
# Gaussian keys with the adapter in plain coordinates tell what the precision does from what the coordinates do.
_LESSON = ((NONE, "worker"), ("1", "worker"), ("160", "worker"), (GAUSSIAN, "worker"), (GAUSSIAN, "enclave"))


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How much is measured.

    Args:
        model: directory or name on the hub; the bundled model where None.
        keys: of inference and of the single layer. lessons: keys of training, and the side where the adapter is.
        checked: keys of the two-process check.
        draws, gaussian_draws: of keys, in inference; the condition number of a Gaussian key is itself random.
        seeds: of training, 0 and up.
        windows, window_tokens: of text. width, rows: of the single layer.
    """

    model: str | None = None
    keys: tuple[str, ...] = SWEEP
    lessons: tuple[tuple[str, str], ...] = _LESSON
    checked: tuple[str, ...] = ("1", "160", GAUSSIAN)
    draws: int = 1
    gaussian_draws: int = 4
    seeds: int = 1
    windows: int = 4
    window_tokens: int = 256
    width: int = 1280
    rows: int = 256
    lesson: Lesson = dataclasses.field(default_factory=lambda: Lesson(steps=150))

    def draws_of(self, keys: str) -> int:
        """Return how often keys of this name are drawn."""
        return {NONE: 1, GAUSSIAN: self.gaussian_draws}.get(keys, self.draws)


PRESETS = {
    "tiny": Preset(
        keys=(NONE, "1", "160", GAUSSIAN),
        lessons=((NONE, "worker"), (GAUSSIAN, "worker")),
        checked=("160",),
        gaussian_draws=1,
        windows=1,
        window_tokens=64,
        width=96,
        rows=32,
        lesson=Lesson(steps=3, facts=16),
    ),
    "small": Preset(),
    "paper": Preset(
        model="gpt2",
        lessons=(*_LESSON, ("8", "worker"), ("1024", "worker"), ("1024", "enclave")),
        draws=3,
        gaussian_draws=8,
        seeds=3,
        windows=16,
        window_tokens=512,
        lesson=Lesson(steps=300, facts=128, learning_rate=1e-3),
    ),
}


def run(
    preset: str,
    output_dir: Path,
    *,
    model: str | None = None,
    text_file: Path | None = None,
    device: str = "cpu",
    workers: int = 1,
    command: Sequence[str] | None = None,
) -> Path:
    """Measure, or take from the cache in ``output_dir/cells``, and write tables, figure and page; return the Markdown.

    Args:
        preset: ``tiny``, ``small`` or ``paper``. model: instead of the preset's.
        text_file: held-out text for the perplexity; the bundled records, told as sentences, where None.
        device: of the one-process models and of the workers. workers: cells at a time.

    Raises:
        UsageError: unknown preset or device, a model or text that cannot be read.
    """
    if preset not in PRESETS:
        raise UsageError("unknown preset", got=preset, expected=", ".join(PRESETS))
    check_device(device)
    settings = PRESETS[preset]
    name = model or settings.model or str(model_directory())
    plan = _Plan(settings, name, text_file, device)
    cache = CellCache(output_dir / "cells")
    taught = run_cells([plan.lesson(NONE, "float32", "worker", 0)], cache, workers=1)[0]["adapter"]
    groups: dict[str, list[tuple[Row, Cell]]] = {
        "layer": [({"keys": keys, "width": settings.width}, plan.layer(keys)) for keys in _layer_keys(settings)],
        "inference": [(row, plan.inference(row, taught)) for row in _inference_rows(settings)],
        "two processes": [
            ({"keys": keys, "dtype": dtype, "seed": seed}, plan.two_processes(keys, dtype, seed))
            for keys in settings.checked
            for dtype in _PROTECTED_DTYPES
            for seed in range(settings.draws_of(keys))
        ],
        "training": [
            (
                {"keys": keys, "adapter": side, "dtype": dtype, "seed": seed},
                plan.lesson(keys, dtype, side, seed),
            )
            for keys, side in settings.lessons
            for dtype in DTYPE_NAMES
            for seed in range(settings.seeds)
        ],
    }
    cells = [cell for group in groups.values() for _, cell in group]
    values = iter(run_cells(cells, cache, workers=workers))
    results = {title: [(row, next(values)) for row, _ in group] for title, group in groups.items()}
    provenance = {
        **describe(command, seeds=range(settings.seeds), device=device),
        "preset": preset,
        "model": "bundled" if name == str(model_directory()) else name,
        "text": "bundled records" if text_file is None else text_file.name,
        "cells of commits": cache.commits(cells),
    }
    return write_study(output_dir, results, settings.lesson, provenance)


def _layer_keys(settings: Preset) -> tuple[str, ...]:
    return (*settings.keys, UNIFORM)


def _inference_rows(settings: Preset) -> list[Row]:
    rows = []
    for keys in settings.keys:
        for dtype in DTYPE_NAMES:
            for precision in ("float32", "same") if dtype == "bfloat16" and keys != NONE else ("float32",):
                for seed in range(settings.draws_of(keys)):
                    rows.append({"keys": keys, "dtype": dtype, "key precision": precision, "seed": seed})
    return rows


class _Plan:
    """Makes cells: what all of them share is looked at once."""

    def __init__(self, settings: Preset, model: str, text_file: Path | None, device: str) -> None:
        self._settings, config = settings, load_config(model)
        length = min(settings.window_tokens, config.max_position_embeddings)
        tokenizer = load_tokenizer(model, config)
        windows = text_windows(read_text(text_file), tokenizer, windows=settings.windows, length=length)
        check_embedded([int(windows.max())], vocabulary_of(config), "--text_file")
        directory = Path(model)
        self._places = {"model": model, "text_file": None if text_file is None else str(text_file)}
        files = [path for path in directory.iterdir() if path.is_file()] if directory.is_dir() else []
        self._threads = torch.get_num_threads()
        self._common = {
            "model": digest_files(files) if files else f"{model}@{config._commit_hash}",
            "device": device,
            "threads": self._threads,
        }
        if torch.device(device).type == "cuda":
            self._common["accelerator"] = torch.cuda.get_device_name(device)
        self._text = {
            "text": compute.windows_digest(windows),
            "windows": settings.windows,
            "window_tokens": length,
        }

    def layer(self, keys: str) -> Cell:
        inputs: Row = {"keys": keys, "width": self._settings.width, "rows": self._settings.rows, "seed": 0}
        inputs["threads"] = self._threads
        return Cell(label=f"one layer, {keys}", compute=compute.layer, inputs=inputs)

    def inference(self, row: Row, adapter: str) -> Cell:
        inputs = {
            **self._common,
            **self._text,
            **{name: row[name] for name in ("keys", "dtype", "seed")},
            "key_precision": row["key precision"],
            "lesson": dataclasses.asdict(self._settings.lesson),
        }
        places = {**self._places, "adapter": adapter}
        label = f"inference, {row['keys']}, {row['dtype']}"
        return Cell(label=label, compute=compute.inference, inputs=inputs, places=places, memory_gb=2.0)

    def two_processes(self, keys: str, dtype: str, seed: int) -> Cell:
        inputs = {**self._common, **self._text, "keys": keys, "dtype": dtype, "seed": seed}
        return Cell(
            label=f"two processes, {keys}, {dtype}",
            compute=compute.two_processes,
            inputs=inputs,
            places=self._places,
            memory_gb=2.0,
        )

    def lesson(self, keys: str, dtype: str, side: str, seed: int) -> Cell:
        settings = dataclasses.asdict(dataclasses.replace(self._settings.lesson, seed=seed))
        inputs = {**self._common, "keys": keys, "dtype": dtype, "lora": side, "lesson": settings}
        label = f"training, {keys}, {dtype}"
        return Cell(label=label, compute=compute.lesson, inputs=inputs, places=self._places, memory_gb=2.0)
