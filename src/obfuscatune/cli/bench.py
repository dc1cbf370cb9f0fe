"""``obfuscatune bench``: what a profile costs against Hugging Face and PEFT in the clear, measured side by side."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from obfuscatune.cli.output import check_parent
from obfuscatune.cli.table import print_table
from obfuscatune.errors import UsageError

EPILOG = (
    "Examples:\n\nobfuscatune bench --size small --profile balanced --profile paper --markdown bench.md\n\n"
    "obfuscatune bench --size llama-3.2-1b --dtype bfloat16 --profile balanced --workload memory --batch_size 1"
)


def command(
    size: Annotated[
        list[str] | None,
        typer.Option(help="GPT-2 tiny to xl, a shape such as llama-3.2-1b, or a model's directory; repeatable"),
    ] = None,
    profile: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME or NAME+switch=value[+...], @tcp or @tls for a listening worker, @socket for a spawned one "
            "without shared memory; repeatable",
            metavar="PROFILE",
        ),
    ] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(
            help="prefill, decode, lora_step; key (only protect) and memory (prefill and decode once) time nothing "
            "against plain; repeatable"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch_size", help="rows of a batch")] = 4,
    seq_length: Annotated[int, typer.Option("--seq_length", help="tokens of a row, in prefill and lora_step")] = 128,
    new_tokens: Annotated[int, typer.Option("--new_tokens", help="tokens generated for a row, in decode")] = 32,
    repetitions: Annotated[int, typer.Option(help="alternating rounds, of which medians are taken")] = 5,
    threads: Annotated[int | None, typer.Option(help="CPU threads of each process; default: torch's")] = None,
    device: Annotated[str, typer.Option(help="device of the plain model and of the workers")] = "cpu",
    dtype: Annotated[str, typer.Option(help="of the weights: float32 or bfloat16")] = "float32",
    json_file: Annotated[Path | None, typer.Option("--json", help="write all numbers to this file")] = None,
    markdown: Annotated[Path | None, typer.Option(help="write the tables to this file")] = None,
) -> None:
    """Measure protected models of true sizes (random weights) against plain, alternating in one run.

    From a directory, only the configuration is read, not the weights.
    """
    # Torch and transformers take seconds to import; --help and a misspelt option need neither.
    import torch

    from obfuscatune.studies.bench.report import cost_rows, footprint_rows, to_dict, to_markdown
    from obfuscatune.studies.bench.run import BenchOptions, count_steps, run_bench
    from obfuscatune.studies.bench.workloads import Shape
    from obfuscatune.studies.reports.files import write_json, write_text
    from obfuscatune.studies.reports.provenance import describe
    from obfuscatune.studies.reports.tables import columns

    for option, file in (("--json", json_file), ("--markdown", markdown)):
        if file is None:
            continue
        if file.is_dir():
            raise UsageError("a directory, and no file to write", where=f"{option} {file}")
        check_parent(file, f"{option} {file}")
    if json_file is not None and markdown is not None and json_file.resolve() == markdown.resolve():
        raise UsageError("numbers and tables in one file", got=str(markdown), expected="another file for --markdown")
    given = {"sizes": size, "profiles": profile, "workloads": workload}
    options = BenchOptions(
        **{name: tuple(values) for name, values in given.items() if values},
        shape=Shape(batch_size, seq_length, new_tokens),
        repetitions=repetitions,
        threads=threads,
        device=device,
        dtype=dtype,
    )
    # Of the code that runs: the files may change while it does.
    machine = {**describe(device=device), "threads": threads or torch.get_num_threads()}
    bars = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*bars, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("start", total=count_steps(options), completed=-1)
        result = run_bench(options, lambda what: progress.update(task, advance=1, description=what))
    tables = {"cost": cost_rows(result.measurements), "footprint": footprint_rows(result.footprints)}
    for title, rows in tables.items():
        if rows:
            print_table(title, columns(rows), [[str(cell) for cell in row.values()] for row in rows], left=3)
    if json_file is not None:
        write_json(json_file, to_dict(options, result, machine))
    if markdown is not None:
        write_text(markdown, to_markdown(options, result, machine))
