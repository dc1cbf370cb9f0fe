"""``obfuscatune finetune``: LoRA with the stock Trainer, between enclave and worker."""

# ruff: noqa: RUF009 - option() makes a field, which is what the rule wants there

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import typer

from obfuscatune.cli.options import ConfigOptions, ModelOptions, ProtectionOptions, option, takes
from obfuscatune.errors import ObfuscatuneError, UsageError, WorkerFault

EPILOG = (
    "Examples:\n\nobfuscatune finetune --model_name_or_path gpt2 --train_file train.jsonl --output_dir adapter\n\n"
    "obfuscatune finetune --config run.yaml --profile balanced --worker tcp://gpu-host:7000\n\n"
    "obfuscatune finetune --config run.yaml --resume_from_checkpoint last"
)
_TRAINING: dict[str, Any] = {"rich_help_panel": "Training"}
_LORA: dict[str, Any] = {"rich_help_panel": "LoRA"}
_SAVING: dict[str, Any] = {"rich_help_panel": "Logs and checkpoints"}
# Those that the Trainer's own arguments have under the same names.
_TRAINER_OPTIONS = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "seed"),
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("num_train_epochs", "max_steps", "logging_steps", "save_steps", "save_total_limit", "report_to"),
)


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(ProtectionOptions, ModelOptions, ConfigOptions):
    """Options of ``obfuscatune finetune``; names and defaults as in transformers and PEFT where they have them."""

    train_file: Path = option("JSONL rows with text, prompt + completion, or messages")
    validation_file: Path | None = option("rows to evaluate the loss on, after each epoch", None)
    output_dir: Path = option("where the adapter, report.json and checkpoints go; made with mode 0700")
    overwrite_output_dir: bool = option(
        "write into a directory that is not empty", False, flag="--overwrite_output_dir"
    )
    max_length: int = option("longest row in tokens", 512, min=2)

    learning_rate: float = option("peak learning rate", 2e-4, **_TRAINING)
    per_device_train_batch_size: int = option("rows of a batch", 8, min=1, **_TRAINING)
    per_device_eval_batch_size: int = option("rows of a batch in evaluation", 8, min=1, **_TRAINING)
    gradient_accumulation_steps: int = option("batches in one step", 1, min=1, **_TRAINING)
    num_train_epochs: float = option("passes over the data", 3.0, **_TRAINING)
    max_steps: int = option("steps; above 0 it overrides num_train_epochs", -1, **_TRAINING)
    warmup_steps: float = option("steps of linear warm-up; below 1: their share", 0.0, min=0, **_TRAINING)
    lr_scheduler_type: str = option("schedule after the warm-up", "linear", **_TRAINING)
    weight_decay: float = option("decoupled in AdamW", 0.0, min=0, **_TRAINING)
    max_grad_norm: float = option("gradients are clipped to this norm; 0 for not", 1.0, min=0, **_TRAINING)
    optim: Literal["adamw", "sgd"] = option("optimizer", "adamw", **_TRAINING)
    seed: int = option("of the adapter's start and the order of rows; keys are never seeded", 42, min=0, **_TRAINING)

    lora_r: int = option("rank", 16, min=1, **_LORA)
    lora_alpha: int = option("scale, times the rank", 32, min=1, **_LORA)
    lora_dropout: float = option("dropout on the adapter's input", 0.0, min=0, max=1, **_LORA)
    lora_target_modules: list[str] | None = option(
        "layers, repeated or with commas; default: all four of a block", None, **_LORA
    )

    logging_steps: int = option("steps between logs", 10, min=1, **_SAVING)
    save_steps: int = option("steps between checkpoints", 500, min=1, **_SAVING)
    save_total_limit: int | None = option("checkpoints to keep; default: all", None, min=1, **_SAVING)
    resume_from_checkpoint: str | None = option("a checkpoint's path, or last", None, **_SAVING)
    report_to: str = option("tensorboard, wandb, ... where installed", "none", **_SAVING)


@takes(FinetuneOptions)
def command(options: FinetuneOptions) -> None:
    """Fine-tune a model on private rows; the worker sees no token, no plain weight and no plain activation.

    Writes an ordinary PEFT adapter. What a profile does show to the worker is told in docs/design.md. Ctrl-C ends the
    step, saves a checkpoint and stops.
    """
    checkpoint = _prepare_output(options)
    from obfuscatune.cli.loading import load_model, load_tokenizer
    from obfuscatune.data import Collator, encode_rows, read_rows
    from obfuscatune.enclave.protected import protect
    from obfuscatune.training.checkpoints import load_keys, remove_checkpoints, save_adapter
    from obfuscatune.training.interrupt import StopOnInterrupt
    from obfuscatune.training.trainer import ProtectedTrainer

    arguments = _training_arguments(options)
    protection = options.protection()
    secret = None if checkpoint is None else load_keys(checkpoint, protection["profile"])
    files = [read_rows(path) for path in (options.train_file, options.validation_file) if path is not None]
    base = load_model(options.model_name_or_path, options.dtype)
    tokenizer = load_tokenizer(options.model_name_or_path, base.config)
    positions = getattr(base.config, "max_position_embeddings", options.max_length)
    length = min(options.max_length, positions)
    encoded = [encode_rows(rows, tokenizer, length) for rows in files]
    for path, (_, summary) in zip((options.train_file, options.validation_file), encoded, strict=False):
        counts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in asdict(summary).items())
        print(f"{path}: {counts}", file=sys.stderr)
    model = _add_adapter(base, options)
    with (
        protect(model, **protection, secret=secret, progress=True) as protected,
        StopOnInterrupt() as interrupt,
    ):
        if checkpoint is None:
            remove_checkpoints(options.output_dir)  # of another run, under other keys: "last" must not find them
        data = [rows for rows, _ in encoded]
        trainer = ProtectedTrainer(
            protected,
            kind=options.optim,
            args=arguments,
            train_dataset=data[0],
            eval_dataset=data[1] if len(data) > 1 else None,
            data_collator=Collator(tokenizer.pad_token_id),
        )
        trainer.add_callback(interrupt)
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except WorkerFault as fault:
            raise _with_checkpoint(fault, options.output_dir) from fault
        if interrupt.requested:
            if trainer.state.global_step < trainer.state.max_steps:
                print(f"interrupted: {_how_to_resume(options.output_dir)}", file=sys.stderr)
                raise typer.Exit(130)
            print("interrupted after the last step: the training is complete", file=sys.stderr)
        save_adapter(protected.model, options.output_dir)
        report = protected.report()
    _write_report({"training": trainer.state.log_history, **report.to_dict()}, options.output_dir)
    print(report)


def _prepare_output(options: FinetuneOptions) -> Path | None:
    """Refuse what would be overwritten; return the checkpoint to resume from, if any."""
    directory, checkpoint = options.output_dir, None
    if options.resume_from_checkpoint is not None:
        from obfuscatune.training.checkpoints import find_checkpoint

        checkpoint = find_checkpoint(options.resume_from_checkpoint, directory)
    elif (
        directory.exists() and (not directory.is_dir() or any(directory.iterdir())) and not options.overwrite_output_dir
    ):
        hint = "--overwrite_output_dir, or --resume_from_checkpoint last to continue the run that is there"
        raise UsageError("output directory is not empty", where=str(directory), hint=hint)
    try:
        # An adapter tells of the rows that it was trained on, and a checkpoint's secret opens all the worker has seen.
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError("cannot make the output directory", got=error.strerror, where=str(directory)) from None
    return checkpoint


def _add_adapter(base: Any, options: FinetuneOptions) -> Any:
    """Return the PEFT model around ``base``, its adapter drawn from the seed."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    from obfuscatune.families import family_of

    spec = family_of(base.config)
    given = [name for names in options.lora_target_modules or () for name in names.replace(",", " ").split()]
    set_seed(options.seed)
    adapter = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=given or sorted({spec.qkv, spec.out, spec.up, spec.down}),
        fan_in_fan_out=spec.in_out,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(base, adapter)
    except ValueError as error:
        hint = f"for this family: {', '.join(sorted({spec.qkv, spec.out, spec.up, spec.down}))}"
        raise UsageError(
            "the adapter does not fit the model", got=", ".join(given), where="--lora_target_modules", hint=hint
        ) from error


def _training_arguments(options: FinetuneOptions) -> Any:
    """Return the Trainer's own arguments."""
    from transformers import TrainingArguments
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    available = ["none", *get_available_reporting_integrations()]  # type: ignore[no-untyped-call]
    if options.report_to not in available:
        raise UsageError("nothing installed to report to", got=options.report_to, expected=", ".join(available))
    try:
        return TrainingArguments(
            output_dir=str(options.output_dir),
            use_cpu=True,  # the enclave's part; what may run on an accelerator is the worker
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            prediction_loss_only=True,
            eval_strategy="epoch" if options.validation_file else "no",
            **{name: getattr(options, name) for name in _TRAINER_OPTIONS},
        )
    except ValueError as error:
        raise UsageError("training options", got=str(error).splitlines()[0]) from error


def _with_checkpoint(fault: WorkerFault, output_dir: Path) -> WorkerFault:
    return WorkerFault(
        fault.what,
        worker=fault.worker,
        layer=fault.layer,
        call=fault.call,
        got=fault.got,
        expected=fault.expected,
        hint=_how_to_resume(output_dir),
    )


def _how_to_resume(output_dir: Path) -> str:
    from obfuscatune.training.checkpoints import checkpoints

    found = checkpoints(output_dir)
    if not found:
        return "there is no checkpoint yet; start again, with a smaller --save_steps"
    return f"go on with the same options and --resume_from_checkpoint {found[-1]}"


def _write_report(report: dict[str, Any], output_dir: Path) -> None:
    path = output_dir / "report.json"
    try:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        path.unlink(missing_ok=True)
        raise ObfuscatuneError("cannot write the report", got=error.strerror, where=str(path)) from error
