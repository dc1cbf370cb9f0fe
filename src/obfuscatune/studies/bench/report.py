"""The benchmark's results as tables for people and as plain values for scripts."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from obfuscatune.studies.bench.run import BenchOptions, BenchResult, Footprint, Measurement
from obfuscatune.studies.reports.tables import Row, columns, markdown_table

_TEXTS = ("model", "profile", "workload")  # columns that are not numbers


def cost_rows(measurements: Sequence[Measurement]) -> list[Row]:
    """Speed against plain, and what crossed the boundary."""
    return [
        {
            "model": m.size,
            "profile": m.profile,
            "workload": m.workload,
            "plain tok/s": f"{m.plain_tokens_per_second:,.1f}",
            "ours tok/s": f"{m.tokens_per_second:,.1f}",
            "ratio": f"{m.ratio:.2f}x",
            "calls / tok / layer": f"{m.calls_per_token_layer:.3f}",
            "bytes / tok / layer": f"{m.bytes_per_token_layer:,.0f}",
        }
        for m in measurements
    ]


def footprint_rows(footprints: Sequence[Footprint]) -> list[Row]:
    """Seconds of protecting, share of the parameters in the enclave, peak memory of each process."""
    return [
        {
            "model": f.size,
            "profile": f.profile,
            "protect": f"{f.obfuscation_seconds:.1f} s",
            "in the enclave": f"{100 * f.enclave_share:.1f} %",
            "enclave peak": _mebibytes(f.enclave_peak_bytes),
            "worker peak": _mebibytes(f.worker_peak_bytes),
            "plain peak": _mebibytes(f.plain_peak_bytes),
        }
        for f in footprints
    ]


def _mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:,.0f} MiB"


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
        parts.append(_markdown(cost_rows(result.measurements)))
    parts.append(_markdown(footprint_rows(result.footprints)))
    return "\n\n".join(parts) + "\n"


def _markdown(rows: Sequence[Row]) -> str:
    return markdown_table(rows, right=[name for name in columns(rows) if name not in _TEXTS])
