"""Whichever replies come first: two threads for each worker, of which one sends its requests and one takes its replies.

A worker that does not even read what it is sent holds up its own threads and nobody else.
"""

import queue
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor

from obfuscatune.enclave.replies import Pending

_MOST_LATE = 8  # replies that a worker may owe before it gets no more to do

Answer = Tensor | BaseException
Box = queue.SimpleQueue[tuple[int, Answer]]  # where the answers to one request come together, by worker


class Waiting:
    """Asks so many workers, and waits for them. Threads start with a worker's first request, and end with `close`."""

    def __init__(self, count: int) -> None:
        self._lines: list[_Line | None] = [None] * count
        self._lock = threading.Lock()

    def is_late(self, worker: int) -> bool:
        """Whether the worker owes so many replies that it should get no more requests for now."""
        line = self._lines[worker]
        return line is not None and line.owed >= _MOST_LATE

    def ask(self, worker: int, submit: Callable[[], Pending], box: Box) -> None:
        """Send a request, and have the ``y`` of its reply put into the box when it comes, or the error in its stead."""
        with self._lock:
            line = self._lines[worker]
            if line is None:
                line = self._lines[worker] = _Line(worker)
        line.ask(submit, box)

    def close(self) -> None:
        """End the threads, once their sessions have ended."""
        for line in self._lines:
            if line is not None:
                line.requests.put(None)


class _Line:
    """Requests to one worker, and its replies, each in their order."""

    def __init__(self, worker: int) -> None:
        self.worker, self.owed = worker, 0
        self.requests: queue.SimpleQueue[tuple[Callable[[], Pending], Box] | None] = queue.SimpleQueue()
        self._sent: queue.SimpleQueue[tuple[Pending, Box] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        for target, name in ((self._send, "requests"), (self._receive, "replies")):
            threading.Thread(target=target, daemon=True, name=f"{name} {worker}").start()

    def ask(self, submit: Callable[[], Pending], box: Box) -> None:
        with self._lock:
            self.owed += 1
        self.requests.put((submit, box))

    def _send(self) -> None:
        while (item := self.requests.get()) is not None:
            submit, box = item
            try:
                self._sent.put((submit(), box))
            except Exception as error:  # told to whoever waits
                self._answer(box, error)
            del item, submit, box
        self._sent.put(None)

    def _receive(self) -> None:
        while (item := self._sent.get()) is not None:
            pending, box = item
            answer: Any
            try:
                # A copy, not in place: where it is wrong it is read again, to name the liar, which must not change it.
                answer = pending.result()[1]["y"]
            except Exception as error:  # told to whoever waits
                answer = error
            self._answer(box, answer)
            del item, pending, box, answer

    def _answer(self, box: Box, answer: Answer) -> None:
        with self._lock:
            self.owed -= 1
        box.put((self.worker, answer))
