"""One trial: a model, fine-tuned on a task from a seed by one method, and the harness' verdict on it."""

import logging
import math
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from functools import lru_cache
from random import Random
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from obfuscatune.enclave.protect import protect
from obfuscatune.enclave.protected import Protected
from obfuscatune.settings import TrainingSettings
from obfuscatune.studies.bench.run import parse_profile
from obfuscatune.studies.tasks.harness import ProtectedLM, TaskResult, evaluate, training_rows
from obfuscatune.training.arguments import add_adapter, training_arguments
from obfuscatune.training.data import Row
from obfuscatune.training.encoding import Collator, encode_rows, vocabulary_of
from obfuscatune.training.loading import load_model, load_tokenizer
from obfuscatune.training.trainer import ProtectedTrainer

# The choice of the rows to learn from is the same for every seed of a run: its spread is of training alone.
_ROWS_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What decides a trial's outcome, but for model and data.

    Args:
        task: one of the four. method: a profile of `obfuscatune.profiles`, or ``None`` for plain PEFT in the clear.
        dtype: of the base model and of the wire; the adapter of a bfloat16 model is float32, as PEFT keeps it.
        training: all settings, the seed among them.
        train_rows, eval_items: at most so many; all where None.
        no_dropout: the model's own dropout is off, as far as training would use it.
        threads: of this process and of the worker, each. device: of plain, and of the worker.
    """

    task: str
    method: str | None
    dtype: str
    training: TrainingSettings
    train_rows: int | None
    eval_items: int | None
    eval_batch_size: int
    no_dropout: bool
    threads: int
    device: str = "cpu"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Trial":
        """Return the trial of `to_dict`'s values."""
        return cls(**{**values, "training": TrainingSettings.from_dict(values["training"])})


def run_trial(trial: Trial, model: str, data_dir: str | None) -> dict[str, Any]:
    """Train and evaluate, and return metrics, predictions, losses, seconds, and what a profile had to switch off.

    Unprotected is Hugging Face's and PEFT's own code throughout: stock ``Trainer``, torch's AdamW, the harness' ``hf``.

    Args:
        model: directory, or name on the hub. data_dir: of local JSONL; the hub where None.

    Returns:
        ``metrics``, ``items`` (rows of `Prediction`), ``answer_nll`` (mean nats of the likeliest right answer),
        ``losses`` as logged, ``steps``, ``train_seconds``, ``eval_seconds``, ``key_seconds``, ``switched_off``.
    """
    with _threads(trial.threads), _quiet(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        base = load_model(model, trial.dtype)
        tokenizer = load_tokenizer(model, base.config)
        if trial.no_dropout:
            _switch_off_dropout(base)
        rows = _training_rows(trial.task, data_dir, trial.train_rows)
        longest = min(trial.training.max_length, base.config.max_position_embeddings)
        encoded, _ = encode_rows(rows, tokenizer, longest, vocabulary=vocabulary_of(base.config))
        adapted = add_adapter(base, trial.training)
        started = time.perf_counter()
        with _protected(trial, adapted) as protected:
            keyed = time.perf_counter()
            losses, steps = _train(trial, adapted, protected, encoded, tokenizer)
            trained = time.perf_counter()
            lm = _language_model(adapted, protected, tokenizer, trial.eval_batch_size)
            result = evaluate(lm, [trial.task], data_dir=data_dir, limit=trial.eval_items)[trial.task]
            evaluated = time.perf_counter()
    return {
        "metrics": result.metrics,
        "items": [asdict(item) for item in result.predictions],
        "answer_nll": _answer_nll(result),
        "losses": losses,
        "steps": steps,
        "key_seconds": keyed - started,
        "train_seconds": trained - keyed,
        "eval_seconds": evaluated - trained,
        "switched_off": sorted({str(w.message).split(" > 0 ")[0] for w in caught if "switched off" in str(w.message)}),
    }


@contextmanager
def _protected(trial: Trial, model: Any) -> Iterator[Protected | None]:
    if trial.method is None:
        model.to(trial.device)
        yield None
        return
    device = None if trial.device == "cpu" else trial.device
    with protect(model, profile=parse_profile(trial.method), device=device, threads=trial.threads) as protected:
        yield protected


def _train(
    trial: Trial, model: Any, protected: Protected | None, rows: list[Any], tokenizer: Any
) -> tuple[list[float], int]:
    """Return the losses that the Trainer logs, one at least, and the number of steps."""
    from transformers import PrinterCallback, Trainer

    settings = trial.training
    with tempfile.TemporaryDirectory(prefix="obfuscatune-trial-") as directory:
        arguments = training_arguments(
            settings,
            directory,
            use_cpu=protected is not None or trial.device == "cpu",
            logging_strategy="steps",
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        common = {"args": arguments, "train_dataset": rows, "data_collator": Collator(tokenizer.pad_token_id)}
        if protected is None:
            # Not the Trainer's default, a fused one: what differs from the protected run is the protection alone.
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            adamw = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)
            trainer = Trainer(model=model, optimizers=(adamw, None), **common)
            trainer.remove_callback(PrinterCallback)
        else:
            trainer = ProtectedTrainer(protected, kind="adamw", quiet=True, **common)
        whole = trainer.train().training_loss
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return losses or [float(whole)], trainer.state.global_step  # few rows: it has ended before the first log


def _language_model(model: Any, protected: Protected | None, tokenizer: Any, batch_size: int) -> HFLM:
    if protected is not None:
        return ProtectedLM(protected, tokenizer=tokenizer, batch_size=batch_size)
    return HFLM(model, tokenizer=tokenizer, batch_size=batch_size)


@lru_cache(maxsize=8)
def _training_rows(task: str, data_dir: str | None, count: int | None) -> Sequence[Row]:
    rows = training_rows(task, data_dir)
    return rows if count is None or count >= len(rows) else Random(_ROWS_SEED).sample(rows, count)  # noqa: S311


def _switch_off_dropout(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif getattr(module, "attention_dropout", 0.0):  # where it is a number of the attention's
            module.attention_dropout = 0.0


def _answer_nll(result: TaskResult) -> float:
    """Mean over items of ``-max log p(answer | prompt)`` over its right answers, in nats: finer than an accuracy."""
    best = [max(item.likelihoods[index] for index in item.answers) for item in result.predictions]
    return -math.fsum(best) / len(best)


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out the harness' bars and the libraries' remarks: a run of many trials has one bar of its own."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
            yield
    finally:
        logging.disable(before)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Sums are ordered by the number of threads: the same number, the same last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
