"""The benchmark's results as tables for people and as JSON for scripts, with the machine they were measured on."""

import dataclasses
import datetime
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from obfuscatune import __version__
from obfuscatune.studies.bench.run import BenchOptions, BenchResult, Footprint, Measurement

Table = tuple[list[str], list[list[str]]]  # header and rows

_COST_HEADER = [
    "model",
    "profile",
    "workload",
    "plain tok/s",
    "ours tok/s",
    "ratio",
    "calls/tok/layer",
    "bytes/tok/layer",
]
_FOOTPRINT_HEADER = ["model", "profile", "protect", "in the enclave", "enclave peak", "worker peak", "plain peak"]


def cost_table(measurements: Sequence[Measurement]) -> Table:
    """Speed against plain, and what crossed the boundary."""
    rows = [
        [
            m.size,
            m.profile,
            m.workload,
            f"{m.plain_tokens_per_second:,.1f}",
            f"{m.tokens_per_second:,.1f}",
            f"{m.ratio:.2f}x",
            f"{m.calls_per_token_layer:.3f}",
            f"{m.bytes_per_token_layer:,.0f}",
        ]
        for m in measurements
    ]
    return _COST_HEADER, rows


def footprint_table(footprints: Sequence[Footprint]) -> Table:
    """Seconds of protecting, share of the parameters in the enclave, peak memory of each process."""
    rows = [
        [
            f.size,
            f.profile,
            f"{f.obfuscation_seconds:.1f} s",
            f"{100 * f.enclave_share:.1f} %",
            _mebibytes(f.enclave_peak_bytes),
            _mebibytes(f.worker_peak_bytes),
            _mebibytes(f.plain_peak_bytes),
        ]
        for f in footprints
    ]
    return _FOOTPRINT_HEADER, rows


def _mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:,.0f} MiB"


def describe_machine(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Return CPU model, cores, versions, date (UTC) and the command line ``argv``, without the program's path."""
    argv = sys.argv if argv is None else argv
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers", "peft")},
        "obfuscatune": __version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(argv[0]).name, *argv[1:]]),
    }


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or "unknown"


def to_dict(options: BenchOptions, result: BenchResult, machine: dict[str, Any]) -> dict[str, Any]:
    """Return all numbers, those of every round too, as plain values for JSON."""
    derived = (
        "ratio",
        "tokens_per_second",
        "plain_tokens_per_second",
        "calls_per_token_layer",
        "bytes_per_token_layer",
    )
    return {
        "machine": machine,
        "options": dataclasses.asdict(options),
        "measurements": [
            {**dataclasses.asdict(m), **{name: getattr(m, name) for name in derived}} for m in result.measurements
        ],
        "footprints": [dataclasses.asdict(f) for f in result.footprints],
    }


def to_markdown(options: BenchOptions, result: BenchResult, machine: dict[str, Any]) -> str:
    """Return both tables with a sentence on how they were measured."""
    shape = options.shape
    policies = sorted({f"{m.plain_policy} for {m.size} {m.workload}" for m in result.measurements})
    parts = [
        f"Measured on {machine['cores']} cores of {machine['cpu']}, torch {machine['torch']}, {machine['date'][:10]}: "
        f"`{machine['command']}`. Batch {shape.batch_size}, {shape.seq_length} tokens a row, "
        f"{shape.new_tokens} new tokens, medians of {options.repetitions} alternating rounds."
    ]
    if policies:
        parts[0] += (
            f" Plain ran under the waiting policy (`OMP_WAIT_POLICY`) that suits it best: {', '.join(policies)}."
        )
        parts.append(_markdown(cost_table(result.measurements)))
    parts.append(_markdown(footprint_table(result.footprints)))
    return "\n\n".join(parts) + "\n"


def _markdown(table: Table) -> str:
    header, rows = table
    aligned = ["---" if not rows or not _is_number(rows[0][i]) else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, aligned, *rows))


def _is_number(cell: str) -> bool:
    return cell == "-" or cell[0].isdigit()
