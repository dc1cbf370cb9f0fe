"""A job that runs, and the queries of jobs that are done, share the one thread that computes: by turns.

Between two steps of the training, and between two batches of an evaluation or of completions, queries get as much time
as the job has had since their last turn, and at most `TURN_SECONDS`. The time of loading another job's model is taken
off what they get later. So over all, queries never take more than the job, but for one load and one turn, and a query
waits for one step, unless others before it have used up the time.

Turns are in the training's own thread. A second thread would compute no more on the enclave's cores, and would have to
be kept out of what libraries hold per process: torch's random numbers, among others, which turns leave as they were.
So a training's results are bit for bit the same with queries as without.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from obfuscatune.parties.vocabulary import TURN_SECONDS


class Turns:
    """The turns of queries in one job.

    Args:
        turn: answers queries for so many seconds. wanted: whether there are any. hurried: whether the enclave is about
            to end and those that were begun are answered first: there is a turn then, whatever others have used up.

    Attributes:
        seconds: that queries have taken so far, loading included.
    """

    def __init__(
        self,
        turn: Callable[[float], None],
        wanted: Callable[[], bool],
        hurried: Callable[[], bool] = lambda: False,
    ) -> None:
        self._turn, self._wanted, self._hurried = turn, wanted, hurried
        self._since, self._left = time.monotonic(), 0.0
        self.seconds = 0.0

    def __call__(self) -> float:
        """Give a turn, if it is wanted and there is time for it; return the seconds of all so far."""
        now = time.monotonic()
        self._left = min(self._left + now - self._since, TURN_SECONDS)
        if (self._left > 0 or self._hurried()) and self._wanted():
            with own_randomness():
                self._turn(self._left)
        self._since = time.monotonic()
        self._left -= self._since - now
        self.seconds += self._since - now
        return self.seconds


@contextmanager
def own_randomness() -> Iterator[None]:
    """Leave the random numbers of torch, numpy and Python as they were, whatever is drawn within."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])
