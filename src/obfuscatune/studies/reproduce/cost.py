"""What protection costs on the four true sizes of GPT-2, random weights: parameters, seconds, bytes and calls.

The paper: about 5 % of GPT2-XL's parameters in the TEE; 1.5 to 4.3 times slower than unprotected, on two GPUs of which
one plays the TEE; keys for GPT2-XL in under 10 s on a middle-range GPU. Shares, calls and bytes of a forward follow
from the configuration alone, for all sizes; seconds are measured where the preset says so, by `obfuscatune bench`.
"""

import dataclasses
import functools
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from obfuscatune.enclave.families import Decoder, read_decoder
from obfuscatune.enclave.families.fit import fit
from obfuscatune.errors import UsageError
from obfuscatune.studies.bench.estimate import Estimate, estimate
from obfuscatune.studies.bench.run import parse_profile
from obfuscatune.studies.bench.workloads import DTYPES, SIZES, WORKLOADS, Shape
from obfuscatune.studies.device import check_device
from obfuscatune.studies.reports.provenance import describe
from obfuscatune.studies.reproduce import cost_cells as compute
from obfuscatune.studies.reproduce.cells import Cell, CellCache, Value, run_cells
from obfuscatune.studies.reproduce.cost_report import Measured, write_study
from obfuscatune.studies.reproduce.layer import fhe_version

TRUE_SIZES = ("small", "medium", "large", "xl")
PROFILES = ("balanced", "paper", "naive", "strict", "stream", "shared")
_WITHOUT_NAIVE = ("balanced", "paper", "strict", "stream", "shared")
# On a CPU the weights of plain, enclave and worker are all in its memory: from this size on one at a time, so that
# GPT2-XL stays within 20 GiB.
_APART_ON_CPU = ("medium", "large", "xl")


@dataclass(frozen=True, kw_only=True)
class Part:
    """What is measured of one size: key time under each profile, and the workloads, each in so many rounds."""

    size: str
    profiles: tuple[str, ...] = PROFILES
    workloads: tuple[str, ...] = tuple(WORKLOADS)
    rounds: int = 3


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Parts in the order in which they are measured, the shape of the workloads, and rows and width of one layer."""

    parts: tuple[Part, ...]
    layer: tuple[int, int] | None = None
    shape: Shape = dataclasses.field(default_factory=Shape)


PRESETS = {
    "tiny": Preset(
        parts=(Part(size="tiny", profiles=("balanced",), workloads=("lora_step",), rounds=1),),
        shape=Shape(2, 8, 3),
        layer=(2, 64),
    ),
    "small": Preset(
        parts=(
            Part(size="small"),
            Part(size="medium", profiles=_WITHOUT_NAIVE, workloads=("prefill", "lora_step"), rounds=2),
            Part(size="large", profiles=_WITHOUT_NAIVE, workloads=("prefill",), rounds=2),
            Part(size="xl", profiles=("balanced", "paper", "stream"), workloads=()),
        ),
        layer=(16, 768),
    ),
    "paper": Preset(parts=tuple(Part(size=size, rounds=5) for size in TRUE_SIZES), layer=(16, 768)),
    # Of `gpu_check`, which has minutes.
    "gpu-check": Preset(
        parts=(
            Part(size="small", profiles=("balanced", "paper")),
            Part(size="xl", profiles=("balanced", "paper"), workloads=("prefill", "lora_step"), rounds=2),
        )
    ),
}


def run(
    preset: str,
    output_dir: Path,
    *,
    sizes: Sequence[str] = (),
    device: str = "cpu",
    dtype: str = "float32",
    threads: int | None = None,
    seconds: float | None = None,
    command: Sequence[str] | None = None,
) -> Path:
    """Measure, or take from the cache in ``output_dir/cells``, and write tables, figure and page; return the Markdown.

    Args:
        preset: one of `PRESETS`. sizes: some of the preset's, all where empty. device: of plain and of the workers.
        dtype: of weights and wire. threads: of each process. seconds: no new measurement begins later than that.

    Raises:
        UsageError: unknown preset, size, dtype or device. ObfuscatuneError: a measurement failed.
    """
    if preset not in PRESETS:
        raise UsageError("unknown preset", got=preset, expected=", ".join(PRESETS))
    if dtype not in DTYPES:
        raise UsageError("unknown dtype", got=dtype, expected=", ".join(DTYPES))
    check_device(device)
    chosen = PRESETS[preset]
    known = [part.size for part in chosen.parts]
    unknown = sorted(set(sizes) - set(known))
    if unknown:
        raise UsageError("a size that the preset has not", got=", ".join(unknown), expected=", ".join(known))
    common = {
        "shape": dataclasses.asdict(chosen.shape),
        "threads": threads or torch.get_num_threads(),
        "device": device,
        "dtype": dtype,
    }
    # Seconds are of a machine: another one that finds this cache measures for itself.
    origin = describe(command, device=device)
    common["machine"] = {name: origin[name] for name in ("cpu", "cores", "accelerator")}
    cells = [cell for part in chosen.parts if not sizes or part.size in sizes for cell in _cells(part, common, device)]
    if chosen.layer is not None and not sizes and device == "cpu":
        rows, width = chosen.layer
        inputs = {"rows": rows, "width": width, "fhe": fhe_version(), "machine": common["machine"]}
        inputs["threads"] = common["threads"]
        cells.append(Cell(label=f"one layer, {rows} x {width} x {width}", compute=compute.layer, inputs=inputs))
    cache = CellCache(output_dir / "cells")
    values = _until(cells, cache, seconds)
    measured = Measured(
        keys=[value for cell, value in values if cell.compute is compute.key],
        timed=[each for cell, value in values if cell.compute is compute.timed for each in value["measurements"]],
        layer=[each for cell, value in values if cell.compute is compute.layer for each in value["layer"]],
    )
    shown = [size for size in known if size not in TRUE_SIZES] + list(TRUE_SIZES)
    estimates = {(size, name): expected(size, name, dtype) for size in shown for name in PROFILES}
    shape = chosen.shape
    provenance = {
        **origin,
        "preset": preset,
        "dtype": dtype,
        "threads": common["threads"],
        "shape": f"batch {shape.batch_size}, {shape.seq_length} tokens a row, {shape.new_tokens} new tokens",
        "left out for lack of time": len(cells) - len(values),
        "cells of commits": cache.commits([cell for cell, _ in values]),
    }
    return write_study(output_dir, estimates, measured, provenance)


@functools.cache
def expected(size: str, profile: str, dtype: str) -> Estimate:
    """Return what follows from the configuration: share of the parameters, calls and bytes of a forward."""
    decoder = _decoder(size, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return estimate(decoder, fit(decoder, parse_profile(profile)), getattr(torch, dtype).itemsize)


@functools.cache
def _decoder(size: str, dtype: str) -> Decoder:
    shape = SIZES[size]
    config = GPT2Config(
        vocab_size=shape.vocabulary,
        n_positions=shape.positions,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.device("meta"):
        return read_decoder(GPT2LMHeadModel(config).to(getattr(torch, dtype)))


def _named(profiles: Sequence[str]) -> Value:
    """Profiles by name, and what the names stand for today: a value of other switches is not this one's."""
    return {"profiles": list(profiles), "records": [dataclasses.asdict(parse_profile(name)) for name in profiles]}


def _cells(part: Part, common: Value, device: str) -> list[Cell]:
    cells = []
    for profile in part.profiles:
        inputs = {**common, "size": part.size, **_named([profile]), "rounds": 1}
        cells.append(Cell(label=f"{part.size}, {profile}: keys", compute=compute.key, inputs=inputs))
    for workload in part.workloads:
        inputs = {
            **common,
            "size": part.size,
            **_named(part.profiles),
            "rounds": part.rounds,
            "workload": workload,
            "apart": device == "cpu" and part.size in _APART_ON_CPU,
        }
        cells.append(Cell(label=f"{part.size}: {workload}", compute=compute.timed, inputs=inputs))
    return cells


def _until(cells: Sequence[Cell], cache: CellCache, seconds: float | None) -> list[tuple[Cell, Value]]:
    """Run the cells in turn, never two at once: they are timed. A cell that is cached is there whatever the time."""
    end = None if seconds is None else time.monotonic() + seconds
    done = []
    for cell in cells:
        if end is None or time.monotonic() < end or cache.load(cell) is not None:
            done.append((cell, run_cells([cell], cache)[0]))
    return done
