"""``obfuscatune evaluate``: the paper's tasks on a protected model, by lm-evaluation-harness, from local rows."""

# ruff: noqa: RUF009 - option() makes a field, which is what the rule wants there

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from obfuscatune.cli.options import CLAIMS, ConfigOptions, ModelOptions, ProtectionOptions, expand_home, option, takes
from obfuscatune.cli.output import check_new_file
from obfuscatune.durable import write_new
from obfuscatune.errors import ObfuscatuneError, UsageError

EPILOG = CLAIMS + (
    "Examples:\n\nobfuscatune evaluate --model_name_or_path gpt2 --task sciq --data_dir data\n\n"
    "obfuscatune evaluate --model_name_or_path gpt2 --adapter_name_or_path adapter --task sciq --task piqa "
    "--data_dir data --limit 200 --output_file results.json --per_item"
)


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ProtectionOptions, ModelOptions, ConfigOptions):
    """Options of ``obfuscatune evaluate``."""

    adapter_name_or_path: str | None = option(
        "directory, or name on the hub, of a PEFT adapter", None, callback=expand_home
    )
    task: list[str] = option("webqs, openbookqa, piqa or sciq; repeatable")
    data_dir: Path | None = option("directory of local JSONL, a folder for each task; default: the hub", None)
    limit: int | None = option("evaluate only the first N questions of each task", None, min=1)
    num_fewshot: int = option("solved examples in each prompt", 0, min=0)
    batch_size: int = option("choices scored together", 16, min=1)
    output_file: Path | None = option("new JSON file of the results, mode 0600", None)
    per_item: bool = option("write each item's id and choice into that file too", False, flag="--per_item")


@takes(EvaluateOptions)
def command(options: EvaluateOptions) -> None:
    """Evaluate tasks with lm-evaluation-harness' prompts and metrics; results go to stdout, all else to stderr."""
    from obfuscatune.studies.tasks.catalogue import check_data, check_tasks, require_harness

    names = check_tasks(options.task)
    _check_output(options)
    require_harness()
    check_data(names, options.data_dir, options.num_fewshot)
    protection = options.protection()
    from obfuscatune.studies.tasks.harness import ProtectedLM, evaluate

    with ProtectedLM(
        options.model_name_or_path,
        peft=options.adapter_name_or_path,
        dtype=options.dtype,
        batch_size=options.batch_size,
        **protection,
    ) as lm:
        results = evaluate(lm, names, data_dir=options.data_dir, limit=options.limit, num_fewshot=options.num_fewshot)
        report = lm.protected.report()
    print(report, file=sys.stderr)
    print(_table(results))
    if options.output_file is not None:
        _write(options.output_file, _record(options, results))


def _check_output(options: EvaluateOptions) -> None:
    if options.output_file is None and options.per_item:
        raise UsageError("nowhere to write the items", expected="--output_file FILE", where="--per_item")
    check_new_file(options.output_file)


def _table(results: dict[str, Any]) -> str:
    lines = [f"{'task':<12}{'metric':<13}{'value':>8}{'+-':>9}{'items':>8}"]
    for name, result in results.items():
        for metric, value in result.metrics.items():
            error = result.stderr.get(metric)
            spread = f"{error:.4f}" if error is not None else "-"
            lines.append(f"{name:<12}{metric:<13}{value:>8.4f}{spread:>9}{len(result.predictions):>8,}")
    return "\n".join(lines)


def _record(options: EvaluateOptions, results: dict[str, Any]) -> dict[str, Any]:
    from importlib.metadata import version

    from obfuscatune.studies.reports.provenance import describe

    tasks = {}
    for name, result in results.items():
        tasks[name] = {**asdict(result), "items": len(result.predictions)}
        if not options.per_item:
            del tasks[name]["predictions"]
    return {
        "model": options.model_name_or_path,
        "adapter": options.adapter_name_or_path,
        "dtype": options.dtype,
        "profile": options.profile,
        "switches": {name: value for name, value in options.switches.items() if value is not None},
        "num_fewshot": options.num_fewshot,
        "limit": options.limit,
        "batch_size": options.batch_size,
        "lm_eval": version("lm-eval"),
        "tasks": tasks,
        "provenance": describe(device=options.device or "cpu"),
    }


def _write(path: Path, record: dict[str, Any]) -> None:
    """Write JSON for this user only; a new file, because an old one would keep its mode."""
    try:
        write_new(path, (json.dumps(record, indent=2) + "\n").encode())
    except OSError as error:
        raise ObfuscatuneError("cannot write the results", got=error.strerror, where=str(path)) from error
