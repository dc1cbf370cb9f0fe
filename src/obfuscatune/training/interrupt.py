"""Ctrl-C in a training run: the first one ends the step, saves a checkpoint and stops; the second one aborts."""

import os
import signal
from types import FrameType, TracebackType
from typing import Any, Self

from transformers import TrainerCallback

from obfuscatune.training.ranks import Ranks

ONE = Ranks()


class StopOnInterrupt(TrainerCallback):
    """A callback of the Trainer, and a context manager that takes the signal.

    ``requested``: whether it came. If it came after the end of the last step, as in the last evaluation, the training
    is complete; after any other step there is one more, which ends with a checkpoint.
    """

    def __init__(self, ranks: Ranks = ONE) -> None:
        self.requested = False
        self._ranks = ranks
        self._before: Any = signal.SIG_DFL

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Not print: the signal may have come inside another one.
        os.write(2, b"\nstopping after this step, with what was trained saved; Ctrl-C again aborts at once\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Ask the Trainer to save and to stop."""
        self.requested = self._ranks.any(self.requested)  # all stop after the same step
        if self.requested:
            control.should_save = control.should_training_stop = True
