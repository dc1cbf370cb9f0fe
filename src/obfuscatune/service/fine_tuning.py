"""The training of a job: the Trainer on rows in memory, each checkpoint sealed as soon as it is written."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from obfuscatune.enclave.protected import Protected
from obfuscatune.parties import quotas
from obfuscatune.parties.job import Job
from obfuscatune.parties.terms import Terms
from obfuscatune.service.placement import Placed
from obfuscatune.service.sealed_inputs import origin_of
from obfuscatune.service.sealed_results import Write
from obfuscatune.training.arguments import training_arguments
from obfuscatune.training.data import read_rows
from obfuscatune.training.encoding import Collator, encode_rows, positions_of, vocabulary_of
from obfuscatune.training.trainer import ProtectedTrainer


@dataclass(frozen=True)
class Hooks:
    """Whom the runner tells: ``progress(step, steps)``, ``checkpoint(step, digest)``, and what each worker has got.

    ``store(act)`` returns what ``act`` does, which writes a sealed file: it may wait until the disk has room.
    ``between()`` is called where the job can stand still for the queries of others, which it lets be answered; it
    returns the seconds of this so far.
    """

    progress: Callable[[int, int], None]
    checkpoint: Callable[[int, str], None]
    placed: Callable[[Sequence[Placed]], None]
    store: Write = lambda act: act()
    between: Callable[[], float] = lambda: 0.0


def train(
    job: Job,
    protected: Protected,
    tokenizer: Any,
    ram: Path,
    files: Sequence[Path | None],
    *,
    terms: Mapping[str, Terms],
    seal: Callable[[Path], str],
    hooks: Hooks,
) -> list[dict[str, Any]]:
    """Train, and return the Trainer's log: losses, and evaluations where rows are held out.

    Args:
        ram: the directory in memory, with the checkpoint to resume from, if there is one. files: the rows, and those
            held out, if any; both are removed. terms: of the inputs. seal: seals a checkpoint. hooks: whom to tell.

    Raises:
        ConsentError: more training tokens than the terms allow.
    """
    settings = job.settings
    config: Any = protected.model.config
    length = min(settings.max_length, positions_of(config) or settings.max_length)
    rows, held_out = [None if path is None else _encoded(path, tokenizer, length, config) for path in files]
    tokens = quotas.training_tokens(settings, 0 if rows is None else len(rows))
    quotas.require(terms, "max_training_tokens", tokens or 0)
    found = sorted((ram / "run").glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    trainer = ProtectedTrainer(
        protected,
        kind=settings.optim,
        # The first evaluation is before the first step, and in the checkpoints.
        args=training_arguments(
            settings,
            str(ram / "run"),
            report_to="none",
            eval_on_start=held_out is not None,
            logging_first_step=True,
        ),
        quiet=True,  # the terminal is the operator's
        made_with=origin_of(job),
        train_dataset=rows,
        eval_dataset=held_out,
        data_collator=Collator(tokenizer.pad_token_id),
    )
    trainer.add_callback(_SealCheckpoints(seal, hooks))
    trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
    if held_out is not None:
        trainer.evaluate()
    return list(trainer.state.log_history)


class _SealCheckpoints(TrainerCallback):
    """Seals each checkpoint that the Trainer has written into memory, and removes it there; tells of each step.

    The last step is logged like the first: the owner is told how far the loss has come, however short the job is.
    """

    def __init__(self, seal: Callable[[Path], str], hooks: Hooks) -> None:
        self._seal, self._hooks = seal, hooks

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._hooks.progress(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._hooks.progress(state.global_step, state.max_steps)
        control.should_log |= state.global_step >= state.max_steps
        self._hooks.between()

    def on_substep_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._hooks.between()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._hooks.between()

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not path.exists():  # the last one, for which memory has no room: the adapter is made without it
            return
        digest = self._seal(path)
        shutil.rmtree(path)
        self._hooks.checkpoint(state.global_step, digest)


def _encoded(path: Path, tokenizer: Any, max_length: int, config: Any) -> Any:
    """The rows of a file in memory, which is removed."""
    rows, _ = encode_rows(read_rows(path), tokenizer, max_length, vocabulary=vocabulary_of(config))
    path.unlink()
    return rows
