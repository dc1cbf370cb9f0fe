"""``obfuscatune lm-eval``: lm-evaluation-harness' own command line, with the model class ``obfuscatune`` known to it.

lm-eval 0.4.13 imports no model from outside its tree, so this verb registers ours and then runs the harness' ``run``.
"""

# ruff: noqa: RUF009 - option() makes a field, which is what the rule wants there

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from obfuscatune.cli.options import argument, option, takes
from obfuscatune.errors import UsageError

EPILOG = (
    "Examples:\n\nobfuscatune lm-eval --model_args pretrained=gpt2,peft=adapter,profile=balanced --tasks sciq,piqa "
    "--data_dir data --limit 100\n\npython -m lm_eval run --help"
)
_NO_TASK = "Tasks not found:"  # begins the harness' own message
# The harness' options are not declared again here: all that is unknown goes to it, in its order.
CONTEXT = {"ignore_unknown_options": True}


@dataclass(frozen=True, kw_only=True)
class LmEvalOptions:
    """Options of ``obfuscatune lm-eval``."""

    data_dir: Path | None = option("local JSONL for webqs, openbookqa, piqa and sciq; default: the hub", None)
    arguments: list[str] | None = argument(
        "the harness' own: --model_args --tasks --limit --batch_size --num_fewshot --output_path and all others",
        None,
        metavar="OPTIONS",
    )


@takes(LmEvalOptions)
def command(options: LmEvalOptions) -> None:
    """Run lm-evaluation-harness as its own command line would, with --model obfuscatune unless another is named."""
    from obfuscatune.studies.tasks.catalogue import TASKS, require_harness, write_configs

    require_harness()
    with nullcontext() if options.data_dir is None else write_configs(list(TASKS), options.data_dir) as configs:
        from lm_eval._cli import HarnessCLI
        from lm_eval.utils import setup_logging

        from obfuscatune.studies.tasks.harness import MODEL_NAME

        setup_logging()
        try:
            with _arguments(["--model", MODEL_NAME, *(options.arguments or ())]):
                harness = HarnessCLI()
                arguments = harness.parse_args()
        except SystemExit as end:  # argparse has said why
            raise typer.Exit(end.code if isinstance(end.code, int) else 2) from None
        if configs is not None:
            _use_configs(arguments, configs)
        _check(arguments, options.data_dir)
        if arguments.model == MODEL_NAME and arguments.device is None:
            arguments.device = "cpu"  # of the worker: the harness' own default is cuda:0, wherever it runs
        try:
            harness.execute(arguments)
        except ValueError as error:
            # It is only here that it has looked for the tasks, among thousands of files.
            if not str(error).startswith(_NO_TASK):
                raise
            raise UsageError("no such task", got=str(error).removeprefix(_NO_TASK).strip(), where="--tasks") from None


@contextmanager
def _arguments(given: Sequence[str]) -> Iterator[None]:
    """Put the arguments where the harness looks for them."""
    kept, sys.argv = sys.argv, ["lm-eval", "run", *given]
    try:
        yield
    finally:
        sys.argv = kept


def _use_configs(arguments: Any, configs: Path) -> None:
    if arguments.include_path is not None:
        raise UsageError("two sources of tasks", got="--include_path", expected="it, or --data_dir")
    if arguments.cache_requests:
        # The harness' cache of prompts is keyed by the task's name alone, is a pickle, and would hold private rows.
        raise UsageError("the harness' cache of requests knows no local rows", got="--cache_requests with --data_dir")
    arguments.include_path = str(configs)


def _check(arguments: Any, data_dir: Path | None) -> None:
    """Raise what the harness would say with a traceback."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    from obfuscatune.studies.tasks.catalogue import TASKS, check_data

    try:
        config = EvaluatorConfig.from_cli(arguments)
    except (ValueError, TypeError, OSError) as error:
        raise UsageError("the harness refuses the options", got=str(error).splitlines()[0][:200]) from error
    if not config.tasks:
        raise UsageError("no task", expected="--tasks NAME,NAME")
    if arguments.model == "obfuscatune" and "pretrained" not in config.model_args:
        raise UsageError("no model", expected="--model_args pretrained=DIR")
    for name in ("device", "batch_size"):  # which the harness hands to the model itself, and would do twice
        if arguments.model == "obfuscatune" and name in config.model_args:
            raise UsageError("an option of the harness", got=f"{name} in --model_args", expected=f"--{name}")
    check_data([name for name in config.tasks if name in TASKS], data_dir, config.num_fewshot or 0)
