"""Ctrl-C and SIGTERM in a training run: the step is ended, a checkpoint saved, and the run stops.

A second Ctrl-C aborts at once. SIGTERM comes from a scheduler, or from a machine that is about to be taken away, and
SIGKILL follows it: whoever sends it waits for some time only. So the step has a bound then, after which it is given up,
and the last checkpoint is what is left.
"""

import os
import signal
from types import FrameType, TracebackType
from typing import Any, Self

from transformers import TrainerCallback

from obfuscatune.training.ranks import Ranks

ONE = Ranks()


class GivenUpError(KeyboardInterrupt):
    """The step did not end in time after SIGTERM; like Ctrl-C, no handler of errors on the way stops it."""


class StopOnSignal(TrainerCallback):
    """A callback of the Trainer, and a context manager that takes the signals.

    ``requested``: the signal that came, or 0. If it came after the end of the last step, as in the last evaluation, the
    training is complete; after any other step there is one more, which ends with a checkpoint. No evaluation begins
    then: it may take longer than whoever has sent the signal waits. A resumed run makes up for that of an epoch.

    ``in_step``: whether a step is under way, rather than what follows it: a log, a checkpoint, an evaluation.

    Args:
        ranks: the processes that train together. seconds: for the step and its checkpoint, after SIGTERM.
    """

    def __init__(self, ranks: Ranks = ONE, seconds: float = 25.0) -> None:
        self.requested, self.in_step = 0, False
        self._ranks, self._seconds = ranks, seconds
        self._saved = -1  # the step of the last checkpoint
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number, handler in (
            (signal.SIGINT, self._request),
            (signal.SIGTERM, self._request),
            (signal.SIGALRM, self._give_up),
        ):
            self._before[number] = signal.signal(number, handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """As a shell has it of a process that a signal has ended."""
        return 128 + (self.requested or signal.SIGINT)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            return  # SIGTERM after Ctrl-C, or another one of it
        self.requested = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            how = "Ctrl-C again aborts at once"
        else:
            signal.setitimer(signal.ITIMER_REAL, self._seconds)
            how = f"within {self._seconds:g} s"
        # Not print: the signal may have come inside another one.
        os.write(2, f"\nstopping after this step, with what was trained saved; {how}\n".encode())

    def _give_up(self, number: int, frame: FrameType | None) -> None:
        raise GivenUpError

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Know what is given up when the time is over."""
        self.in_step = True

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Ask the Trainer to save and to stop."""
        self.in_step = False
        stopping = self._ranks.any(bool(self.requested))  # all stop after the same step
        self.requested = self.requested or signal.SIGTERM * stopping
        if stopping:
            control.should_save = control.should_training_stop = True
            control.should_evaluate &= state.global_step >= state.max_steps

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Remember the step that was saved."""
        self._saved = state.global_step

    def on_epoch_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Stop without an evaluation, unless the training is complete; the Trainer comes here whenever it stops.

        The signal may have come since the step ended, as while it was saved.
        """
        stopping = self._ranks.any(bool(self.requested))
        self.requested = self.requested or signal.SIGTERM * stopping
        if stopping and state.global_step < state.max_steps:
            control.should_evaluate, control.should_training_stop = False, True
            control.should_save = self._saved != state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """What follows, the adapter of a complete training, is not given up."""
        signal.setitimer(signal.ITIMER_REAL, 0)
