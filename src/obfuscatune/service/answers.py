"""Answers that the enclave still remembers: a question that is asked again costs nothing.

A party whose connection broke asks again, and must not pay twice for what it did not get. Completions are greedy, so
the second answer would be the first one, and tells nothing that the quota is there to limit.
"""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence

from obfuscatune.training.completion import Completion
from obfuscatune.training.data import Prompt

MAX_ANSWERS = 64
MAX_CHARACTERS = 8 << 20


class Answers:
    """The last answers, in memory only; from any thread. Secret: completions are the party's who asked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers: OrderedDict[bytes, list[Completion]] = OrderedDict()
        self._characters = 0

    def get(self, job: str, party: str, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Completion] | None:
        """Return the completions of this party's very question about a job, if they are remembered."""
        with self._lock:
            found = self._answers.get(_digest(job, party, prompts, max_new_tokens))
            return None if found is None else list(found)

    def put(
        self, job: str, party: str, prompts: Sequence[Prompt], max_new_tokens: int, completions: list[Completion]
    ) -> None:
        """Remember an answer, and forget the oldest ones where these are too many or too long."""
        with self._lock:
            digest = _digest(job, party, prompts, max_new_tokens)
            self._forget(digest)
            self._answers[digest] = list(completions)
            self._characters += _size(completions)
            while len(self._answers) > MAX_ANSWERS or self._characters > MAX_CHARACTERS:
                self._forget(next(iter(self._answers)))

    def _forget(self, digest: bytes) -> None:
        self._characters -= _size(self._answers.pop(digest, []))


def _size(completions: Sequence[Completion]) -> int:
    return sum(len(completion.text) for completion in completions)


def _digest(job: str, party: str, prompts: Sequence[Prompt], max_new_tokens: int) -> bytes:
    return hashlib.sha256(json.dumps([job, party, list(prompts), max_new_tokens]).encode()).digest()
