"""``obfuscatune demo``: the main job on a bundled model and records, with a page about it."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from obfuscatune.cli.output import check_place

EPILOG = (
    "Examples:\n\nobfuscatune demo\n\nobfuscatune demo --family llama\n\n"
    "obfuscatune demo --profile paper --output_dir demo-paper\n\n"
    "obfuscatune demo --materials_only --output_dir materials"
)


def command(
    output_dir: Annotated[Path, typer.Option("--output_dir", help="records, adapter and page go here")] = Path(
        "obfuscatune-demo"
    ),
    family: Annotated[str, typer.Option("--family", help="which bundled model: gpt2 or llama")] = "gpt2",
    profile: Annotated[
        str, typer.Option("--profile", help="plain, naive, paper, balanced, strict, stream, shared or enclave")
    ] = "balanced",
    worker: Annotated[str, typer.Option("--worker", help="spawn, unix://PATH or tcp://127.0.0.1:PORT")] = "spawn",
    max_steps: Annotated[int | None, typer.Option("--max_steps", min=1, help="fewer steps, for a quick look")] = None,
    materials_only: Annotated[
        bool,
        typer.Option("--materials_only", help="only write model, records and prompts, for your own trials"),
    ] = False,
) -> None:
    """Fine-tune a bundled model on invented private records, in the clear and protected, and compare."""
    from transformers.utils import logging as transformers_logging

    from obfuscatune.studies.bundled import demo_settings
    from obfuscatune.studies.demo.run import run_demo
    from obfuscatune.studies.demo.story import html_page, summary
    from obfuscatune.studies.reports.files import write_text

    check_place(output_dir, f"--output_dir {output_dir}")
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    settings = demo_settings(family)
    if materials_only:
        from obfuscatune.studies.bundled.records import write_materials

        for path in write_materials(output_dir, settings.seed, settings.facts, family):
            typer.echo(path)
        return
    if max_steps is not None:
        settings = dataclasses.replace(settings, max_steps=max_steps)
    outcome = run_demo(output_dir, profile=profile, worker=worker, settings=settings, say=typer.echo)
    target = output_dir / "report.html"
    write_text(target, html_page(outcome))
    typer.echo(f"\n{summary(outcome)}\npage with plots: {target}")
