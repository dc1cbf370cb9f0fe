"""The stock ``Trainer`` around a protected model, with keys in its checkpoints and the boundary in its logs."""

import inspect
import logging
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.trainer_utils import IntervalStrategy

from obfuscatune.enclave.protected import Protected
from obfuscatune.errors import ObfuscatuneError, UsageError
from obfuscatune.training.checkpoints import finish_checkpoint, keep_last, new_checkpoint, secret_file
from obfuscatune.training.encoding import IGNORED_LABEL
from obfuscatune.training.finite import check_gradients, check_loss
from obfuscatune.training.overlap import check_overlap, check_settings, step, token_shape
from obfuscatune.training.ranks import Ranks

_OPTIMIZERS = {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "sgd": "sgd"}  # names of the Trainer's, and ours
_MADE_HERE = {"model", "model_init", "optimizers", "optimizer_cls_and_kwargs"}  # arguments of the Trainer's
_STOCK = "the stock Trainer takes any optimizer, where the worker holds no LoRA factors"


class ProtectedTrainer(Trainer):
    """Logs, since the log before, tokens/s, bytes and calls across the boundary, and the enclave's share of the time.

    The first loss or gradient that is not finite ends the training with a `TrainingError`.

    Args:
        protected: what ``protect`` returned; its model is trained by the optimizer that it makes.
        kind: ``adamw`` or ``sgd``; default: the one that ``args.optim`` names. Both are torch's own, of these settings.
        overlap: keep two halves of each batch under way (`overlap.py`).
        quiet: print nothing: the loss tells of the data, and the terminal may be somebody else's.
        made_with: what the run is made of (`describe_run`), for its checkpoints.
        args, more: as of ``Trainer``.
    """

    def __init__(
        self,
        protected: Protected,
        *,
        kind: str | None = None,
        args: Any,
        overlap: bool = False,
        quiet: bool = False,
        made_with: Mapping[str, Any] = MappingProxyType({}),
        **more: Any,
    ) -> None:
        if others := _MADE_HERE & more.keys():
            what = "the model and the optimizer of a ProtectedTrainer are what protect made"
            raise UsageError(what, got=", ".join(sorted(others)), expected="protected, kind and args", hint=_STOCK)
        Ranks.of_environment()  # refuses gradients that would cross in the clear
        if overlap:
            check_overlap(protected.model, protected.profile)
            check_settings(args, more.get("compute_loss_func"))
        optimizer = _create_optimizer(protected, kind, args)
        super().__init__(model=protected.model, args=args, optimizers=(optimizer, None), **more)
        self._protected, self._tokens, self._overlap = protected, 0, overlap
        self._quiet, self._made_with = quiet, made_with
        self._refuse_other_decay()
        for printing in (ProgressCallback, PrinterCallback):
            self.remove_callback(printing)
        if not quiet:
            self.add_callback(ProgressOnStderr())
        self._last: tuple[float, ...] | None = None
        self._logits_are_wanted = False
        self._few_logits = _has_few_logits(protected.model)

    def _refuse_other_decay(self) -> None:
        model = self._protected.model
        decayed = set(self.get_decay_parameter_names(model))
        trained = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
        others = [name for name in trained if name not in decayed]
        if self.args.weight_decay and others:  # the stock Trainer decays neither norms nor biases
            what = "weight_decay where norms or biases are trained"
            raise UsageError(what, got=", ".join(others[:3]), expected="weight_decay 0", hint=_STOCK)

    def train(self, *arguments: Any, **named: Any) -> Any:
        """Train as the stock Trainer does.

        Raises:
            UsageError: the settings leave no step to be trained, or the checkpoint has more steps than they ask for.
        """
        trained = super().train(*arguments, **named)
        if self.state.global_step == 0:
            raise UsageError("no step was trained", hint="max_steps, or num_train_epochs, above 0")
        if self.state.global_step > self.state.max_steps:
            raise UsageError(
                "the checkpoint has more steps than are asked for",
                got=self.state.global_step,
                expected=f"at most {self.state.max_steps}",
                hint="resume from an older checkpoint, or with a larger max_steps or num_train_epochs",
            )
        return trained

    def _init_training_state(self, max_steps: int, *arguments: Any) -> tuple[int, int]:
        """Begin or go on; how often a resumed run logs, saves and evaluates is said by its arguments.

        The stock Trainer takes that from the checkpoint, and warns that the two differ.
        """
        logger = logging.getLogger("transformers.trainer_utils")
        logger.addFilter(_is_no_difference_of_intervals)
        try:
            found: tuple[int, int] = super()._init_training_state(max_steps, *arguments)
        finally:
            logger.removeFilter(_is_no_difference_of_intervals)
        self.state.compute_steps(self.args, max_steps)  # type: ignore[no-untyped-call]
        return found

    def _run_epoch(self, *arguments: Any, **named: Any) -> None:
        """Train the rest of an epoch if steps are left; to a run that is complete the stock Trainer adds a step.

        An epoch's last step is saved before the epoch is evaluated. Where a run goes on from there, that evaluation is
        made up for first: it draws random numbers, a rate may depend on it, and it belongs to the report.
        """
        if self.state.global_step >= self.state.max_steps:
            return
        named = inspect.signature(super()._run_epoch).bind(*arguments, **named).arguments
        checkpoint = named["resume_from_checkpoint"]
        resumed = checkpoint is not None and named["epoch"] == named["epochs_trained"]
        at_border = self.state.global_step % named["num_update_steps_per_epoch"] == 0
        if resumed and at_border and self._is_evaluation_left():
            self._load_rng_state(checkpoint)
            named["resume_from_checkpoint"] = None  # or the numbers of the checkpoint would be loaded again
            self._make_up_for_evaluation(named["trial"], named["ignore_keys_for_eval"])
            if self.control.should_training_stop:
                return
        super()._run_epoch(**named)  # type: ignore[no-untyped-call]

    def _finalize_training(self, trial: Any, *arguments: Any) -> Any:
        """End the training, after the last evaluation of a run that was saved when it was complete but for that."""
        was_complete = self._initial_global_step == self.state.global_step == self.state.max_steps
        if was_complete and self._is_evaluation_left():
            self._make_up_for_evaluation(trial, None)
        return super()._finalize_training(trial, *arguments)  # type: ignore[no-untyped-call]

    def _is_evaluation_left(self) -> bool:
        """Whether the epoch that ends with this step, or the run, is to be evaluated and was not."""
        step, epoch = self.state.global_step, self.state.epoch or 0
        if step == 0 or self.args.eval_strategy != IntervalStrategy.EPOCH or self.args.eval_delay > epoch:
            return False
        entries = (entry for entry in self.state.log_history if entry.get("step") == step)
        return not any(name.startswith("eval_") for entry in entries for name in entry)

    def _make_up_for_evaluation(self, trial: Any, ignored: Any) -> None:
        metrics = self._evaluate(trial, ignored)
        self._determine_best_metric(metrics=metrics, trial=trial)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Count the batch's tokens, padding apart; with overlap, run its halves at once."""
        if self._last is None:  # here, so that the first interval does not hold the loading of a checkpoint
            self._last = self._counts()
        self._tokens += _tokens_in(inputs)
        if self._overlap and num_items_in_batch is not None:  # then the halves' losses add up to the batch's
            loss = self._overlapped_step(model, inputs, num_items_in_batch)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        step = self.state.global_step + 1
        check_loss(float(loss), "loss", step)
        check_gradients(model.parameters(), step)
        return loss

    def _overlapped_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> torch.Tensor:
        def loss_of(half: dict[str, Any]) -> torch.Tensor:
            with self.compute_loss_context_manager():
                loss: torch.Tensor = self.compute_loss(model, half, num_items_in_batch=num_items_in_batch)
            return loss

        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return step(loss_of, self._prepare_inputs(inputs), trained)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *more: Any, **named: Any) -> Any:
        """The model's own loss, with logits only at positions where some row has a label: the head is costly.

        Where others read the logits (label smoothing, a loss function or metrics of the caller's), or the model's own
        loss reads all of them, all are there.
        """
        others_read = self._logits_are_wanted or self.label_smoother is not None or self.compute_loss_func is not None
        if others_read or not self._few_logits or not _has_one_label_a_token(inputs):
            return super().compute_loss(model, inputs, *more, **named)
        targets = F.pad(inputs["labels"], (0, 1), value=IGNORED_LABEL)[:, 1:]  # the logits at t are of token t + 1
        positions = (targets != IGNORED_LABEL).any(dim=0).nonzero().flatten()
        if len(positions):
            inputs = {**inputs, "logits_to_keep": positions, "shift_labels": targets[:, positions]}
        return super().compute_loss(model, inputs, *more, **named)

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, *more: Any, **named: Any) -> Any:
        """Evaluate one batch as the stock Trainer does, with all logits if more than the loss is asked for."""
        self._logits_are_wanted = not prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, *more, **named)
        finally:
            self._logits_are_wanted = False

    def log(self, logs: dict[str, float], *more: Any, **named: Any) -> None:
        """Add the measures of the interval since the last log to those of a training step."""
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else ()
        for name in ("eval_loss", *(f"eval_{each}_loss" for each in sets)):
            if name in logs:
                check_loss(logs[name], "loss of the evaluation", self.state.global_step)
        if "train_loss" in logs and self.state.global_step == self._initial_global_step:
            del logs["train_loss"]  # of no step, it would be 0
        if "loss" in logs and self._last is not None:
            now = self._counts()
            seconds, tokens, calls, bytes_moved, waiting = (a - b for a, b in zip(now, self._last, strict=True))
            self._last = now
            logs["tokens_per_second"] = tokens / seconds
            logs["boundary_bytes"], logs["boundary_calls"] = bytes_moved, calls
            logs["enclave_share_of_time"] = 1 - waiting / seconds
        super().log(logs, *more, **named)

    def _counts(self) -> tuple[float, ...]:
        """Running totals: seconds, tokens, calls, bytes in both directions, seconds waiting for the worker."""
        traffic = [t for link in self._protected.links for t in link.session.traffic.values()]
        return (
            time.perf_counter(),
            self._tokens,
            sum(t.calls for t in traffic),
            sum(t.bytes_sent + t.bytes_received for t in traffic),
            sum(t.seconds for t in traffic),
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        path = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        try:
            self._write_checkpoint(path, model, trial)
        except ObfuscatuneError as error:
            if self.state.global_step < self.state.max_steps:
                raise
            # Nothing is left to be trained from it, and the adapter may still find room.
            self._warn(f"{error.what}, the last one: got {error.got}")

    def _warn(self, text: str) -> None:
        if not self._quiet:
            tqdm.write(f"warning: {text}", file=sys.stderr)

    def _write_checkpoint(self, path: Path, model: Any, trial: Any) -> None:
        # The stock Trainer would remove older ones before this one is whole: what is interrupted then leaves none.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            if self.is_world_process_zero():
                with new_checkpoint(path, self._protected.secret):
                    super()._save_checkpoint(model, trial)
            else:  # its state of the random generators, and its own keys
                super()._save_checkpoint(model, trial)
                self._protected.secret.save(secret_file(path, self.args.process_index))
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # all files are there
        if self.is_world_process_zero():
            finish_checkpoint(path, self._protected.asked, self._made_with)
            if limit:
                best = self.state.best_model_checkpoint
                try:
                    keep_last(limit, path, *([Path(best)] if best is not None and Path(best) != path else []))
                except ObfuscatuneError as error:  # the new one is whole, and the run can go on
                    self._warn(f"{error.what}: got {error.got} (at {error.where})")
        self.accelerator.wait_for_everyone()  # whoever goes on finds a whole checkpoint


def _is_no_difference_of_intervals(record: logging.LogRecord) -> bool:
    """Whether a warning is another than that a resumed run logs or saves at other steps, which it then does."""
    text = record.getMessage()
    return "(from trainer_state.json)" not in text or "per_device_train_batch_size" in text


class ProgressOnStderr(ProgressCallback):
    """The stock progress bar; its log lines go to stderr too, so that stdout has results only."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        """Write the numbers of one log."""
        if logs:
            numbers = (f"{name} {value:.4g}" for name, value in logs.items() if name != "total_flos")
            tqdm.write(f"step {state.global_step}  {'  '.join(numbers)}", file=sys.stderr)


def _tokens_in(inputs: Mapping[str, Any]) -> int:
    """Return how many tokens of a batch are no padding; all of them where no mask of one number a token says so."""
    mask, shape = inputs.get("attention_mask"), token_shape(inputs)
    # A mask may be a map too, of one for each kind of attention.
    return int(mask.sum()) if isinstance(mask, torch.Tensor) and mask.ndim == 2 else math.prod(shape or (0,))


def _has_few_logits(model: Any) -> bool:
    """Whether a model computes the logits that it is asked for alone, and its loss from targets that are theirs.

    Some swallow both arguments unread (xLSTM), or compare all labels in a loss of their own (BART's decoder).
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's model names no argument
    names = getattr(getattr(inspect.unwrap(base.forward), "__code__", None), "co_names", ())
    stock = "loss_function" in names and getattr(base, "loss_function", None) is ForCausalLMLoss
    return stock and "logits_to_keep" in inspect.signature(base.forward).parameters


def _has_one_label_a_token(inputs: Mapping[str, Any]) -> bool:
    """Whether the labels of a batch alone say which logits the loss reads.

    Not where the caller's rows come with targets that are shifted already, or choose logits. And of labels that do not
    fit the tokens the stock loss has something to say.
    """
    labels = inputs.get("labels")
    if inputs.get("shift_labels") is not None or inputs.get("logits_to_keep") is not None:
        return False
    return isinstance(labels, torch.Tensor) and labels.shape == token_shape(inputs)


def _create_optimizer(protected: Protected, kind: str | None, args: Any) -> torch.optim.Optimizer:
    """Return the optimizer of the Trainer's settings, wherever what it trains is; refuses what it would ignore."""
    named = str(getattr(args.optim, "value", args.optim))
    # Somebody who asks for sgd by ``kind`` has left ``optim`` as it is, which is adamw.
    if named not in _OPTIMIZERS or (kind or _OPTIMIZERS[named]) == "adamw" != _OPTIMIZERS[named]:
        expected = ", ".join(_OPTIMIZERS) if named not in _OPTIMIZERS else f"{kind}, as kind says"
        raise UsageError("optimizer of a ProtectedTrainer", got=f"optim {named!r}", expected=expected, hint=_STOCK)
    if args.optim_args or args.optim_target_modules:
        raise UsageError("optim_args and optim_target_modules are of other optimizers", hint=_STOCK)
    kind = kind or _OPTIMIZERS[named]
    options = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon} if kind == "adamw" else {}
    return protected.create_optimizer(kind, lr=args.learning_rate, weight_decay=args.weight_decay, **options)
