"""Answers that the enclave still remembers: a question that is asked again costs nothing.

A party whose connection broke asks again, and must not pay twice for what it did not get. Completions are greedy or
drawn by the seed in the question, so the second answer would be the first one, and tells nothing that the quota is
there to limit.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence

from obfuscatune.training.completion import Completion

MAX_ANSWERS = 64
MAX_CHARACTERS = 8 << 20


class Answers:
    """The last answers, in memory only; from any thread. Secret: completions are the party's who asked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers: OrderedDict[str, list[Completion]] = OrderedDict()
        self._characters = 0

    def get(self, question: str) -> list[Completion] | None:
        """Return the completions of this very question (`Query.question`), if they are remembered."""
        with self._lock:
            found = self._answers.get(question)
            return None if found is None else list(found)

    def put(self, question: str, completions: list[Completion]) -> None:
        """Remember an answer, and forget the oldest ones where these are too many or too long."""
        with self._lock:
            self._forget(question)
            self._answers[question] = list(completions)
            self._characters += _size(completions)
            while len(self._answers) > MAX_ANSWERS or self._characters > MAX_CHARACTERS:
                self._forget(next(iter(self._answers)))

    def _forget(self, question: str) -> None:
        self._characters -= _size(self._answers.pop(question, []))


def _size(completions: Sequence[Completion]) -> int:
    return sum(len(completion.text) for completion in completions)
