"""``obfuscatune reproduce``: the paper's tables, each figure beside what the paper claims."""

# ruff: noqa: RUF009 - option() makes a field, which is what the rule wants there

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from obfuscatune.cli.options import expand_home, option, takes
from obfuscatune.cli.output import check_place
from obfuscatune.errors import UsageError

HELP = "Reproduce the paper's claims: CSV, Markdown, figures and one HTML report, with commit, machine and command."

_REPEATED = "repeated or with commas"


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions:
    """Options of every study."""

    preset: Literal["paper", "small", "tiny"] = option("how much is run", "small")
    output_dir: Path = option("for the results; cells that are there already, in cells/, are not computed again")
    device: str = option("of the workers, and of what runs unprotected", "cpu")


@dataclass(frozen=True, kw_only=True)
class AccuracyOptions(ReproduceOptions):
    """Options of ``obfuscatune reproduce accuracy``."""

    data_dir: Path | None = option("directory of local JSONL, a folder for each task; default: the hub", None)
    model_name_or_path: list[str] | None = option(
        f"directory or hub name, instead of the preset's models; {_REPEATED}", None
    )
    sizes: list[str] | None = option(f"some of the preset's models, {_REPEATED}", None)
    tasks: list[str] | None = option(f"webqs, openbookqa, piqa, sciq, records (invented; no data), {_REPEATED}", None)
    methods: list[str] | None = option(f"unprotected, or NAME[+switch=value] of a profile, {_REPEATED}", None)
    dtypes: list[str] | None = option(f"float32, bfloat16, {_REPEATED}", None)
    seeds: list[str] | None = option(f"of the adapter's start and the order of rows, {_REPEATED}", None)
    no_dropout: bool = option(
        "all dropout off, so that protected runs can equal local ones", False, flag="--no_dropout"
    )
    workers: int | None = option("cells at a time; default: as the cores allow", None, min=1)
    memory_gb: float | None = option("memory of all cells together; default: what is free", None, min=0)


@takes(AccuracyOptions)
def accuracy(options: AccuracyOptions) -> None:
    """Table 1: fine-tune and evaluate each task unprotected, naively and protected, from the same seeds."""
    from obfuscatune.studies.reproduce import accuracy

    check_place(options.output_dir, f"--output_dir {options.output_dir}")
    path = accuracy.run(
        options.preset,
        options.output_dir,
        data_dir=options.data_dir,
        models=[str(expand_home(name)) for name in _split(options.model_name_or_path)],
        sizes=_split(options.sizes),
        tasks=_split(options.tasks),
        methods=_split(options.methods),
        dtypes=_split(options.dtypes),
        seeds=_numbers(options.seeds),
        no_dropout=options.no_dropout,
        device=options.device,
        workers=options.workers,
        memory_gb=options.memory_gb,
    )
    print(path.read_text(encoding="utf-8"))


@dataclass(frozen=True, kw_only=True)
class ConditioningOptions(ReproduceOptions):
    """Options of ``obfuscatune reproduce conditioning``."""

    model_name_or_path: str | None = option(
        "directory or hub name, instead of the preset's model", None, callback=expand_home
    )
    text_file: Path | None = option("held-out text for the perplexity; default: the bundled records", None)
    workers: int = option("cells at a time", 1, min=1)


@takes(ConditioningOptions)
def conditioning(options: ConditioningOptions) -> None:
    """Table 2: what the condition number of the keys costs, in float32, bfloat16 and float16."""
    from obfuscatune.studies.reproduce import conditioning

    check_place(options.output_dir, f"--output_dir {options.output_dir}")
    path = conditioning.run(
        options.preset,
        options.output_dir,
        model=options.model_name_or_path,
        text_file=options.text_file,
        device=options.device,
        workers=options.workers,
    )
    print(path.read_text(encoding="utf-8"))


@dataclass(frozen=True, kw_only=True)
class CostOptions(ReproduceOptions):
    """Options of ``obfuscatune reproduce cost``."""

    sizes: list[str] | None = option(f"some of the preset's sizes, {_REPEATED}", None)
    dtype: str = option("dtype of weights and wire: float32 or bfloat16", "float32")
    threads: int | None = option("CPU threads of each process; default: torch's", None, min=1)


@takes(CostOptions)
def cost(options: CostOptions) -> None:
    """Share of parameters in the enclave, key time, slowdown, bytes and calls, for the true sizes of GPT-2."""
    from obfuscatune.studies.reproduce import cost

    check_place(options.output_dir, f"--output_dir {options.output_dir}")
    path = cost.run(
        options.preset,
        options.output_dir,
        sizes=_split(options.sizes),
        device=options.device,
        dtype=options.dtype,
        threads=options.threads,
    )
    print(path.read_text(encoding="utf-8"))


def _split(values: Sequence[str] | None) -> list[str]:
    return [name for value in values or () for name in value.replace(",", " ").split()]


def _numbers(values: Sequence[str] | None) -> list[int]:
    try:
        numbers = [int(value) for value in _split(values)]
    except ValueError:
        raise UsageError("a seed is no number", where="--seeds") from None
    if any(number < 0 for number in numbers):
        raise UsageError("a seed is negative", where="--seeds")
    return numbers


COMMANDS = {
    "accuracy": (
        accuracy,
        "Examples:\n\nobfuscatune reproduce accuracy --preset small --data_dir data --output_dir results\n\n"
        "obfuscatune reproduce accuracy --preset paper --sizes small,medium --device cuda --output_dir results",
    ),
    "conditioning": (
        conditioning,
        "Examples:\n\nobfuscatune reproduce conditioning --preset small --output_dir results",
    ),
    "cost": (
        cost,
        "Examples:\n\nobfuscatune reproduce cost --preset small --output_dir results\n\n"
        "obfuscatune reproduce cost --preset paper --device cuda --dtype bfloat16 --output_dir results",
    ),
}
