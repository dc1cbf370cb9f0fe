"""Whichever replies come first: one thread for each worker, which waits for its replies in turn."""

import queue
import threading

from torch import Tensor

from obfuscatune.enclave.replies import Pending

_MOST_LATE = 8  # replies that a worker may owe before it gets no more to do

Answer = Tensor | BaseException
Box = queue.SimpleQueue[tuple[int, Answer]]  # where the answers to one request come together, by worker
_Requests = queue.SimpleQueue[tuple[Pending, Box] | None]


class Waiting:
    """Waits for replies of so many workers. A thread starts with its worker's first request, and ends with `close`."""

    def __init__(self, count: int) -> None:
        self._requests: list[_Requests | None] = [None] * count
        self._owed = [0] * count
        self._lock = threading.Lock()

    def is_late(self, worker: int) -> bool:
        """Whether the worker owes so many replies that it should get no more requests for now."""
        return self._owed[worker] >= _MOST_LATE

    def ask(self, worker: int, pending: Pending, box: Box) -> None:
        """Have the ``y`` of a reply put into the box when it comes, or the error in its stead."""
        with self._lock:
            self._owed[worker] += 1
            requests = self._requests[worker]
            if requests is None:
                requests = self._requests[worker] = queue.SimpleQueue()
                arguments = (worker, requests)
                threading.Thread(target=self._serve, args=arguments, daemon=True, name=f"replies {worker}").start()
        requests.put((pending, box))

    def close(self) -> None:
        """End the threads, once their sessions have ended."""
        for requests in self._requests:
            if requests is not None:
                requests.put(None)

    def _serve(self, worker: int, requests: _Requests) -> None:
        while (item := requests.get()) is not None:
            pending, box = item
            answer: Answer
            try:
                answer = pending.result()[1]["y"]
            except Exception as error:  # told to whoever waits
                answer = error
            with self._lock:
                self._owed[worker] -= 1
            box.put((worker, answer))
            del item, pending, box, answer
