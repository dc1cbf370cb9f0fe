"""``obfuscatune finetune``: LoRA with the stock Trainer, between enclave and worker."""

# ruff: noqa: RUF009 - option() makes a field, which is what the rule wants there

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

from obfuscatune.cli.options import CLAIMS, ConfigOptions, ModelOptions, ProtectionOptions, option, takes
from obfuscatune.cli.output import OneWriter, check_place, is_empty
from obfuscatune.errors import ObfuscatuneError, UsageError, WorkerFault
from obfuscatune.settings import TrainingSettings
from obfuscatune.training.arguments import add_adapter, training_arguments
from obfuscatune.training.ranks import Ranks

EPILOG = CLAIMS + (
    "Examples:\n\nobfuscatune finetune --model_name_or_path gpt2 --train_file train.jsonl --output_dir adapter\n\n"
    "obfuscatune finetune --model_name_or_path DIR --train_file chats.jsonl --output_dir adapter --max_length 2048\n\n"
    "obfuscatune finetune --config run.yaml --worker tls://gpu:7000#FINGERPRINT --identity lab.key\n\n"
    "obfuscatune finetune --model_name_or_path gpt2 --task sciq --data_dir data --output_dir adapter\n\n"
    "obfuscatune finetune --config run.yaml --resume_from_checkpoint last"
)
_SAVING: dict[str, Any] = {"rich_help_panel": "Logs and checkpoints"}


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(TrainingSettings, ProtectionOptions, ModelOptions, ConfigOptions):
    """Options of ``obfuscatune finetune``; names and defaults as in transformers and PEFT where they have them."""

    train_file: Path | None = option("JSONL rows with text, prompt + completion, or messages; docs/data.md", None)
    task: str | None = option("instead of a file: webqs, openbookqa, piqa or sciq, by the harness' prompts", None)
    data_dir: Path | None = option("directory of the task's local JSONL; default: the hub", None)
    validation_file: Path | None = option("rows to evaluate the loss on, after each epoch", None)
    output_dir: Path = option("where the adapter, report.json and checkpoints go; made with mode 0700")
    overwrite_output_dir: bool = option(
        "write into a directory that is not empty", False, flag="--overwrite_output_dir"
    )
    resume_from_checkpoint: str | None = option("a checkpoint's path, or last", None, **_SAVING)
    allow_changed: list[str] | None = option(
        "what may differ from the checkpoint's run, by its option's name; repeatable", None, **_SAVING
    )
    overlap: bool = option(
        "keep two halves of each batch under way, where the link to the worker is slow", False, flag="--overlap"
    )
    stop_seconds: float = option(
        "after SIGTERM: seconds for the step and its checkpoint", 25.0, min=0.1, ceiling=1e6, **_SAVING
    )
    report_to: str = option("tensorboard, wandb, ... where installed", "none", **_SAVING)


@takes(FinetuneOptions)
def command(options: FinetuneOptions) -> None:
    """Fine-tune a model on private rows; its large layers run on a worker that sees only what the profile shows it.

    Writes an ordinary PEFT adapter. Ctrl-C and SIGTERM end the step, save a checkpoint and stop.
    """
    _check_source(options)
    ranks = Ranks.of_environment()
    with OneWriter(options.output_dir) as writer:
        if ranks.first:
            writer.take()
        _finetune(options, ranks, writer)


def _finetune(options: FinetuneOptions, ranks: Ranks, writer: OneWriter) -> None:
    checkpoint = _check_output(options, ranks)
    from obfuscatune.enclave.protect import protect
    from obfuscatune.training.checkpoints import load_checkpoint, remove_checkpoints, save_adapter
    from obfuscatune.training.encoding import Collator, encode_rows, positions_of, vocabulary_of
    from obfuscatune.training.interrupt import GivenUpError, StopOnSignal
    from obfuscatune.training.loading import load, load_tokenizer
    from obfuscatune.training.origin import check_origin, describe_run
    from obfuscatune.training.trainer import ProtectedTrainer

    protection = options.protection()
    ranks.check(protection["profile"], overlap=options.overlap)
    protection["worker"] = ranks.workers_of(protection["worker"])
    arguments = _training_arguments(options, ranks)
    secret, made_with = None, None
    if checkpoint is not None:
        secret, made_with = load_checkpoint(checkpoint, protection["profile"], ranks.rank)
    rows = _read_rows(options)
    base = load(options.model_name_or_path, options.dtype, protection["profile"])
    tokenizer = load_tokenizer(options.model_name_or_path, base.config)
    length = min(options.max_length, positions_of(base.config) or options.max_length)
    known = vocabulary_of(base.config)
    encoded = [encode_rows(of_source, tokenizer, length, vocabulary=known) for of_source in rows.values()]
    for source, (_, summary) in zip(rows, encoded, strict=True) if ranks.first else ():
        counts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in asdict(summary).items())
        print(f"{source}: {counts}", file=sys.stderr)
        for text in summary.warnings():
            print(f"warning: {source}: {text}", file=sys.stderr)
    run = describe_run(options, base=base, dtype=options.dtype, rows=next(iter(rows.values())), processes=ranks.size)
    if made_with is not None:
        check_origin(made_with, run, options.allow_changed or (), str(checkpoint))
    model = add_adapter(base, options)
    with (
        protect(model, **protection, secret=secret, progress=ranks.first) as protected,
        StopOnSignal(ranks, options.stop_seconds) as interrupt,
    ):
        if ranks.first:
            _make_output(options, checkpoint, writer)
        if ranks.first and (checkpoint is None or not _is_in(checkpoint, options.output_dir)):
            remove_checkpoints(options.output_dir)  # of another run, under other keys: "last" must not find them
        data = [examples for examples, _ in encoded]
        trainer = ProtectedTrainer(
            protected,
            kind=options.optim,
            args=arguments,
            overlap=options.overlap,
            quiet=not ranks.first,
            made_with=run,
            train_dataset=data[0],
            eval_dataset=data[1] if len(data) > 1 else None,
            data_collator=Collator(tokenizer.pad_token_id),
        )
        trainer.add_callback(interrupt)
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except WorkerFault as fault:
            raise _with_checkpoint(fault, options.output_dir) from fault
        except GivenUpError:
            what = _what_is_lost(options, trainer.state.global_step, interrupt.in_step)
            print(f"interrupted: {what}; {_how_to_resume(options.output_dir)}", file=sys.stderr)
            raise typer.Exit(interrupt.exit_code) from None
        if interrupt.requested:
            if trainer.state.global_step < trainer.state.max_steps:
                print(f"interrupted: {_how_to_resume(options.output_dir)}", file=sys.stderr)
                raise typer.Exit(interrupt.exit_code)
            print("interrupted after the last step: the training is complete", file=sys.stderr)
        report = protected.report()
        if not ranks.first:
            return
        save_adapter(protected.model, options.output_dir)
    _write_report({"training": trainer.state.log_history, **report.to_dict()}, options.output_dir)
    print(report)


def _check_source(options: FinetuneOptions) -> None:
    """Refuse no training rows, two sources of them, and what says something of a source or run that is not given."""
    if (options.train_file is None) == (options.task is None):
        what = "no training rows" if options.task is None else "two sources of training rows"
        raise UsageError(what, expected="--train_file FILE, or --task NAME with --data_dir DIR")
    if options.data_dir is not None and options.task is None:
        raise UsageError("a data directory without a task", where="--data_dir", hint="--task NAME")
    if options.allow_changed and options.resume_from_checkpoint is None:
        hint = "--resume_from_checkpoint last"
        raise UsageError("changes to a run that is not resumed", where="--allow_changed", hint=hint)


def _read_rows(options: FinetuneOptions) -> dict[str, list[Any]]:
    """Return the rows of each source: to learn from, and, where given, to validate on."""
    from obfuscatune.training.data import read_rows

    rows: dict[str, list[Any]] = {}
    if options.task is not None:
        from obfuscatune.studies.tasks.catalogue import require_harness

        require_harness()
        from obfuscatune.studies.tasks.harness import training_rows

        rows[f"task {options.task}"] = training_rows(options.task, options.data_dir)
    if options.train_file is not None:
        rows[str(options.train_file)] = read_rows(options.train_file)
    if options.validation_file is not None:
        rows[f"{options.validation_file} (validation)"] = read_rows(options.validation_file)
    return rows


def _check_output(options: FinetuneOptions, ranks: Ranks) -> Path | None:
    """Refuse what would be overwritten; return the checkpoint to resume from, if any."""
    directory, checkpoint = options.output_dir, None
    if options.resume_from_checkpoint is not None:
        from obfuscatune.training.checkpoints import find_checkpoint

        checkpoint = find_checkpoint(options.resume_from_checkpoint, directory)
    if not ranks.first:
        return checkpoint  # what is in the directory may be the first process's own
    _refuse_to_overwrite(options, checkpoint)
    check_place(directory, str(directory))
    return checkpoint


def _refuse_to_overwrite(options: FinetuneOptions, checkpoint: Path | None) -> None:
    directory = options.output_dir
    going_on = checkpoint is not None and _is_in(checkpoint, directory)
    if not going_on and not is_empty(directory, str(directory)) and not options.overwrite_output_dir:
        hint = "--overwrite_output_dir, or --resume_from_checkpoint last to continue the run that is there"
        raise UsageError("output directory is not empty", where=str(directory), hint=hint)


def _is_in(checkpoint: Path, directory: Path) -> bool:
    """Whether a checkpoint is of the run in that directory; its results may come from another one's.

    A link to one in another place is of the directory that it is in, and of the one that it leads to.
    """
    return directory.resolve() in (checkpoint.resolve().parent, checkpoint.parent.resolve())


def _make_output(options: FinetuneOptions, checkpoint: Path | None, writer: OneWriter) -> None:
    """Make the output directory: not before all inputs are read, and a worker is there.

    That may be minutes after it was looked at, and another run may have made it meanwhile.
    """
    directory = options.output_dir
    try:
        # An adapter tells of the rows that it was trained on, and a checkpoint's secret opens all the worker has seen.
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError("cannot make the output directory", got=error.strerror, where=str(directory)) from None
    writer.take()
    _refuse_to_overwrite(options, checkpoint)


def _training_arguments(options: FinetuneOptions, ranks: Ranks) -> Any:
    """Return the Trainer's own arguments."""
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    available = ["none", *get_available_reporting_integrations()]  # type: ignore[no-untyped-call]
    if options.report_to not in available:
        raise UsageError("nothing installed to report to", got=options.report_to, expected=", ".join(available))
    evaluation = "epoch" if options.validation_file else "no"
    more = {"ddp_backend": "gloo"} if ranks.size > 1 else {}
    return training_arguments(
        options, str(options.output_dir), eval_strategy=evaluation, report_to=options.report_to, **more
    )


def _with_checkpoint(fault: WorkerFault, output_dir: Path) -> WorkerFault:
    return WorkerFault(
        fault.what,
        worker=fault.worker,
        layer=fault.layer,
        call=fault.call,
        got=fault.got,
        expected=fault.expected,
        hint="; ".join([*([fault.hint] if fault.hint else []), _how_to_resume(output_dir)]),
    )


def _what_is_lost(options: FinetuneOptions, step: int, in_step: bool) -> str:
    """What was under way when SIGTERM's time was over: the step after this one, or what follows one that is saved."""
    from obfuscatune.training.checkpoints import checkpoints

    late = f"did not end within {options.stop_seconds:g} s"
    saved = [path.name for path in checkpoints(options.output_dir)]
    if not in_step and f"checkpoint-{step}" in saved:
        return f"step {step} is saved, and what follows it {late}"
    return f"the step {late} and is lost"


def _how_to_resume(output_dir: Path) -> str:
    from obfuscatune.training.checkpoints import checkpoints

    found = checkpoints(output_dir)
    if not found:
        return "there is no checkpoint yet; start again, with a smaller --save_steps"
    return f"go on with the same options and --resume_from_checkpoint {found[-1]}"


def _write_report(report: dict[str, Any], output_dir: Path) -> None:
    path = output_dir / "report.json"
    try:
        path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        path.unlink(missing_ok=True)
        raise ObfuscatuneError("cannot write the report", got=error.strerror, where=str(path)) from error
