"""lm-evaluation-harness over a protected model: its prompts, its likelihood code, its metrics, our forward pass."""

import inspect
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from lm_eval import simple_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM, get_dtype
from lm_eval.tasks import TaskManager
from transformers import LogitsProcessorList

from obfuscatune.enclave.arguments import check_options
from obfuscatune.enclave.protect import protect
from obfuscatune.enclave.protected import Protected
from obfuscatune.enclave.spawn import check_workers
from obfuscatune.errors import UsageError
from obfuscatune.parties.identity import Identity
from obfuscatune.profiles import SWITCHES, Profile, resolve
from obfuscatune.studies.tasks.catalogue import check_data, check_tasks, packaged_configs, write_configs
from obfuscatune.training.data import Row
from obfuscatune.training.encoding import check_embedded, vocabulary_of
from obfuscatune.training.finite import FiniteScores, check_logits
from obfuscatune.training.loading import DTYPES, load, load_adapter, load_config, load_tokenizer

MODEL_NAME = "obfuscatune"
# What HFLM makes of the logits and of texts, and so can be left to it.
_PASSED_ON = frozenset(
    {"max_length", "truncation", "logits_cache", "softmax_dtype", "add_bos_token", "prefix_token_id", "max_batch_size"}
)


@register_model(MODEL_NAME)
class ProtectedLM(HFLM):  # type: ignore[misc]
    """The harness' ``hf`` model with the forward pass between enclave and worker; ``--model obfuscatune``.

    Args:
        pretrained: directory, or name on the hub; or a `Protected` that runs already, with its ``tokenizer``.
        tokenizer: one that is loaded, or where it is; that of ``pretrained`` by default.
        peft: adapter. dtype: of the weights, the checkpoint's own by default, as in ``hf``.
        profile, worker, threads, timeout, identity, insecure: as in ``obfuscatune.protect``. device: of a spawned
            worker; ``cpu`` is its default, and the model itself is on the CPU in any case.
        options: switches of the profile, and arguments of ``hf`` that concern logits or texts only.

    Raises:
        UsageError: an argument of ``hf`` that cannot be done here (placement, quantization, remote code, ...), a value
            that does not fit, or more than one process.
    """

    def __init__(
        self,
        pretrained: str | Protected,
        *,
        tokenizer: Any = None,
        peft: str | None = None,
        dtype: str = "auto",
        profile: str | Profile = "balanced",
        worker: str | Sequence[str] = "spawn",
        device: str | None = None,
        threads: int | None = None,
        timeout: float = 600.0,
        identity: Identity | str | Path | None = None,
        insecure: bool = False,
        batch_size: int | str = 1,
        **options: Any,
    ) -> None:
        switches = {name: options.pop(name) for name in SWITCHES if name in options}
        _refuse(options)
        _check_values(timeout=timeout, batch_size=batch_size, **options)
        if isinstance(pretrained, Protected):
            ours: dict[str, Any] = {"peft": peft, "dtype": dtype, "profile": profile, "worker": worker}
            ours |= {"device": device, "threads": threads, "timeout": timeout}
            ours |= {"identity": identity, "insecure": insecure}
            _refuse_beside_protected({**ours, **switches})
            self.protected = pretrained
        else:
            device = None if device == "cpu" else device
            check_options(worker, threads, float(timeout))
            profile = resolve(profile, **switches)
            if profile.remote:  # told before the model is read
                workers = [worker] if isinstance(worker, str) else worker
                identity = check_workers(workers, threads=threads, device=device, identity=identity, insecure=insecure)
            model = load(pretrained, _dtype(pretrained, dtype), profile)
            if tokenizer is None or isinstance(tokenizer, str):
                # `hf` has it from the tokenizer, whose own rule of what goes before a text it changes.
                own = {name: options[name] for name in ("add_bos_token",) if options.get(name) is not None}
                tokenizer = load_tokenizer(tokenizer or pretrained, model.config, **own)
            if peft is not None:
                if len(tokenizer) != model.config.vocab_size:
                    model.resize_token_embeddings(len(tokenizer))  # as hf does: the softmax is over the tokenizer's own
                model = load_adapter(model, peft)
            self.protected = protect(
                model.eval(),
                profile=profile,
                worker=worker,
                device=device,
                threads=threads,
                timeout=float(timeout),
                identity=identity,
                insecure=insecure,
                progress=True,
            )
        if tokenizer is None:
            raise UsageError("a protected model comes without a tokenizer", expected="tokenizer=...")
        with _quiet():
            super().__init__(self.protected.model, tokenizer=tokenizer, batch_size=batch_size, **options)
        if isinstance(pretrained, str):
            self.pretrained, self.peft = pretrained, peft

    def get_model_info(self) -> dict[str, Any]:
        """Return the harness' record of the model: all its parameters, wherever they are, and the profile."""
        report = self.protected.report()
        name = self.pretrained if isinstance(self.pretrained, str) else type(self.protected.model).__name__
        return {
            "model_name": name,
            "model_num_parameters": report.total_parameters,
            "model_dtype": self.protected.model.dtype,
            "peft": self.peft,
            "profile": report.profile.name,
            "worker_parameters": report.worker_parameters,
        }

    def _loglikelihood_tokens(self, requests: Any, *more: Any, **named: Any) -> Any:
        """As the harness does it, which cuts what is too long and says so in a log that nobody reads."""
        requests = list(requests)
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            expected = f"at most {self.max_length:,}"
            raise UsageError("a choice has more tokens than the model has positions", got=longest, expected=expected)
        long = sum(len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in requests)
        if long:
            lost = f"beyond the model's {self.max_length:,} positions, and lost their beginning"
            warnings.warn(f"{long:,} of {len(requests):,} prompts with a choice are {lost}", stacklevel=2)
        return super()._loglikelihood_tokens(requests, *more, **named)

    def _model_call(self, inps: torch.Tensor, *more: Any, **named: Any) -> Any:
        self._refuse_beyond(inps)
        logits: torch.Tensor = super()._model_call(inps, *more, **named)
        check_logits(logits)
        return logits

    def _model_generate(self, context: torch.Tensor, *more: Any, **named: Any) -> Any:
        self._refuse_beyond(context)
        return super()._model_generate(context, *more, logits_processor=LogitsProcessorList([FiniteScores()]), **named)

    def _refuse_beyond(self, tokens: torch.Tensor) -> None:
        check_embedded([int(tokens.max())], vocabulary_of(self.protected.model.config), "a prompt of the tasks")

    def close(self) -> None:
        """End the session with the worker."""
        self.protected.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Prediction:
    """What the model chose for one document: its id and indices of choices in the harness' order; no text.

    Args:
        choice: the likeliest. choice_norm: the likeliest by character, the one of ``acc_norm``.
        greedy: those that greedy decoding would write; ``exact_match`` asks for one of them.
        answers: the right ones. likelihoods: log-likelihood of each, in nats; two predictions may be equal without.
    """

    id: str
    choice: int
    choice_norm: int
    greedy: tuple[int, ...]
    answers: tuple[int, ...]
    likelihoods: tuple[float, ...] = field(compare=False)


@dataclass(frozen=True)
class TaskResult:
    """One task's metrics by the harness' names, their standard errors, and the prediction of each document."""

    metrics: dict[str, float]
    stderr: dict[str, float | None]
    version: float
    predictions: tuple[Prediction, ...]


def evaluate(
    lm: HFLM,
    tasks: Sequence[str],
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int = 0,
) -> dict[str, TaskResult]:
    """Evaluate with the harness' ``simple_evaluate`` and return what it found for each task.

    Args:
        lm: a `ProtectedLM`, or the harness' ``hf`` model, for comparison. tasks: of the four.
        data_dir: of local JSONL, see `read_splits`; the hub otherwise. limit: first documents of each task only.

    Raises:
        UsageError: unknown task, no data, or examples in the prompt that `check_data` refuses.
    """
    names = check_tasks(tasks)
    check_data(names, data_dir, num_fewshot)
    with _quiet():
        found = simple_evaluate(
            model=lm,
            tasks=list(load_tasks(names, data_dir).values()),
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=True,
            task_manager=TaskManager(include_defaults=False),  # of no use, but its own would read 13,000 files
        )
    return {name: _result(found["results"][name], found["samples"][name], found["versions"][name]) for name in names}


def load_tasks(names: Sequence[str], data_dir: str | Path | None) -> dict[str, Any]:
    """Return the harness' task objects over local rows, or over the hub's where ``data_dir`` is None."""
    folder = [packaged_configs()[name].parent for name in names]
    with nullcontext() if data_dir is None else write_configs(names, data_dir) as configs:
        manager = TaskManager(include_defaults=False, include_path=folder if configs is None else configs)
        try:
            tasks: dict[str, Any] = manager.load(list(names))["tasks"]
        except (ConnectionError, FileNotFoundError) as error:
            raise UsageError(
                "cannot load the data", got=type(error).__name__, hint="--data_dir DIR for local JSONL"
            ) from error
    return tasks


def training_rows(name: str, data_dir: str | Path | None) -> list[Row]:
    """Return the task's training documents as rows: the harness' prompt, and its delimiter with the right choice.

    ``Row(doc_to_text(d), target_delimiter + right choice of d)``, from the training split alone. A WebQuestions row
    learns the answer that is listed first, so that each question counts once, as in the evaluation.

    Raises:
        UsageError: unknown task, no training rows. DataError: a bad row.
    """
    [name] = check_tasks([name])
    with _quiet():
        task = load_tasks([name], data_dir)[name]
    rows = []
    for number, document in enumerate(task.training_docs()):
        # Before doc_to_choice, which sorts the answers where they are.
        right = document["answers"][0] if name == "webqs" else _right_choice(task, document)
        completion = f"{task.config.target_delimiter}{right}"
        rows.append(Row(task.doc_to_text(document), completion, where=f"{name}, training row {number}"))
    if not rows:
        raise UsageError(f"no training rows of task {name}", expected="train.jsonl", where=f"--data_dir {data_dir}")
    return rows


def _right_choice(task: Any, document: dict[str, Any]) -> str:
    return str(task.doc_to_choice(document)[int(task.doc_to_target(document))])


def _result(metrics: dict[str, Any], samples: list[dict[str, Any]], version: float) -> TaskResult:
    # The harness' names are "acc,none" and "acc_stderr,none": metric and filter.
    numbers = {key.split(",")[0]: value for key, value in metrics.items() if "," in key}
    stderr = {
        name.removesuffix("_stderr"): value if isinstance(value, float) else None
        for name, value in numbers.items()
        if name.endswith("_stderr")
    }
    values = {name: float(value) for name, value in numbers.items() if not name.endswith("_stderr")}
    return TaskResult(values, stderr, version, tuple(_prediction(sample) for sample in samples))


def _prediction(sample: dict[str, Any]) -> Prediction:
    likelihoods = np.array([likelihood for likelihood, _ in sample["filtered_resps"]])
    # The continuation is a delimiter of one character and the choice.
    lengths = np.array([float(len(continuation) - 1) for _, continuation in sample["arguments"]])
    greedy = tuple(index for index, (_, is_greedy) in enumerate(sample["filtered_resps"]) if is_greedy)
    key = str(sample["doc"].get("id", sample["doc_id"]))
    target = sample["target"]
    answers = tuple(int(index) for index in (target if isinstance(target, list) else [target]))
    chosen = int(np.argmax(likelihoods)), int(np.argmax(likelihoods / lengths))
    return Prediction(key, *chosen, greedy, answers, tuple(likelihoods.tolist()))


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out the harness' warnings: they speak to those who call it themselves."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _refuse(options: dict[str, Any]) -> None:
    unknown = sorted(options.keys() - _PASSED_ON)
    if unknown:
        known = (
            "pretrained, peft, dtype, profile and its switches, worker, identity, insecure, device, threads, timeout"
        )
        expected = f"{known}, batch_size, {', '.join(sorted(_PASSED_ON))}"
        raise UsageError("the protected model cannot do this", got=", ".join(unknown), expected=expected)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("one process evaluates one protected model", got="a distributed launch", hint="start it alone")


def _refuse_beside_protected(given: dict[str, Any]) -> None:
    """Refuse what says how to load and protect a model, beside one that is protected already."""
    defaults = inspect.signature(ProtectedLM.__init__).parameters
    beside = [name for name, value in given.items() if name not in defaults or value != defaults[name].default]
    if beside:
        expected = "the model's name; or say it to protect()"
        raise UsageError("the model is protected already", got=", ".join(beside), expected=expected)


def _is_batch_size(value: Any) -> bool:
    kind, colon, times = str(value).partition(":")
    return (float(times) > 0 if colon else True) if kind == "auto" else int(value) >= 0


def _check_values(**options: Any) -> None:
    """Refuse values that the harness would meet with an exception of any kind: they come from a line of text."""
    fits: dict[str, tuple[Callable[[Any], bool], str]] = {
        "timeout": (lambda value: float(value) > 0, "seconds above 0"),
        "batch_size": (_is_batch_size, "a number, auto, or auto:N with N above 0"),
        "max_length": (lambda value: type(value) is int and value > 0, "a number of tokens"),
        "max_batch_size": (lambda value: type(value) is int and value > 0, "a number of rows"),
        "softmax_dtype": (lambda value: isinstance(get_dtype(value), torch.dtype), "a dtype of torch"),
        "prefix_token_id": (lambda value: type(value) is int and value >= 0, "the number of a token"),
    }
    for name in (name for name in fits if options.get(name) is not None):
        fit, expected = fits[name]
        try:
            fault = not fit(options[name])
        except (ValueError, TypeError, AttributeError):
            fault = True
        if fault:
            raise UsageError(f"value of {name}", got=ascii(options[name])[:40], expected=expected)


def _dtype(name: str, dtype: str) -> str:
    given = str(dtype)
    if given == "auto":
        given = str(load_config(name).dtype or torch.float32).removeprefix("torch.")
    if given not in DTYPES:
        raise UsageError("dtype of the weights", got=given, expected=", ".join(DTYPES), hint="dtype=float32")
    return given
