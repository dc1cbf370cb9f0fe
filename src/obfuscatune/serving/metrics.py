"""Counts for Prometheus' text format: no prompt, no name of a client, no address."""

import threading
from collections import Counter
from collections.abc import Iterable

BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)  # seconds


class Histogram:
    """Counts of values below bounds, as Prometheus wants them: each bound counts all below it."""

    def __init__(self, bounds: Iterable[float] = BOUNDS) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * len(self._bounds)
        self._sum, self._count = 0.0, 0

    def add(self, value: float) -> None:
        """Count a value."""
        self._sum, self._count = self._sum + value, self._count + 1
        for number, bound in enumerate(self._bounds):
            if value <= bound:
                self._counts[number] += 1

    def lines(self, name: str) -> list[str]:
        """Return the lines of Prometheus' text format."""
        found = [f'{name}_bucket{{le="{bound:g}"}} {n}' for bound, n in zip(self._bounds, self._counts, strict=True)]
        return [
            *found,
            f'{name}_bucket{{le="+Inf"}} {self._count}',
            f"{name}_sum {self._sum:.6f}",
            f"{name}_count {self._count}",
        ]


class Metrics:
    """What a server has done; from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._prompt_tokens = self._completion_tokens = self._cancelled = self._steps = 0
        self._seconds, self._first = Histogram(), Histogram()
        self._batches = Histogram((1, 2, 4, 8, 16, 32, 64))

    def answered(self, path: str, status: int) -> None:
        """Count an answer. path: a route of ours, or ``other``: a client's own path is not repeated."""
        with self._lock:
            self._requests[path, status] += 1

    def generated(self, tokens: int) -> None:
        """Count tokens of completions."""
        with self._lock:
            self._completion_tokens += tokens

    def stepped(self, tokens: int) -> None:
        """Count a step of decoding, and the tokens that it gave, one for each row that went on."""
        with self._lock:
            self._steps += 1
            self._completion_tokens += tokens

    def batched(self, rows: int) -> None:
        """Count a round of so many rows."""
        with self._lock:
            self._batches.add(rows)

    def completed(self, prompt_tokens: int, seconds: float, first: float | None, *, cancelled: bool) -> None:
        """Count a request that has ended. first: seconds to its first token."""
        with self._lock:
            self._prompt_tokens += prompt_tokens
            self._cancelled += cancelled
            self._seconds.add(seconds)
            if first is not None:
                self._first.add(first)

    def text(self, waiting: int, running: int, alive: bool) -> str:
        """Return all in Prometheus' text format, version 0.0.4."""
        with self._lock:
            requests = [
                f'obfuscatune_requests_total{{path="{path}",status="{status}"}} {count}'
                for (path, status), count in sorted(self._requests.items())
            ]
            families: list[tuple[str, str, str, list[str]]] = [
                ("requests_total", "counter", "answers, by route and status", requests),
                _one("prompt_tokens_total", "counter", "tokens of prompts", self._prompt_tokens),
                _one("completion_tokens_total", "counter", "tokens of completions", self._completion_tokens),
                _one("steps_total", "counter", "steps of decoding; tokens over steps: rows at a time", self._steps),
                _one("cancelled_total", "counter", "requests whose client left", self._cancelled),
                _one("waiting_requests", "gauge", "requests in the queue", waiting),
                _one("running_requests", "gauge", "requests being computed", running),
                _one("model_up", "gauge", "1 while the model can be asked", int(alive)),
                _of("request_seconds", "seconds of a request, waiting included", self._seconds),
                _of("first_token_seconds", "seconds to the first token", self._first),
                _of("batch_rows", "requests computed together", self._batches),
            ]
        lines: list[str] = []
        for name, kind, text, values in families:
            lines += [f"# HELP obfuscatune_{name} {text}", f"# TYPE obfuscatune_{name} {kind}", *values]
        return "\n".join(lines) + "\n"


def _one(name: str, kind: str, text: str, value: int) -> tuple[str, str, str, list[str]]:
    return name, kind, text, [f"obfuscatune_{name} {value}"]


def _of(name: str, text: str, histogram: Histogram) -> tuple[str, str, str, list[str]]:
    return name, "histogram", text, histogram.lines(f"obfuscatune_{name}")
