"""A query of a party: what it may say, judged as hostile, and its answer on the way from one thread to another."""

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from obfuscatune.errors import FormatError, UsageError
from obfuscatune.serving.limits import ServerLimits
from obfuscatune.serving.models import Defaults
from obfuscatune.serving.refusal import Refusal
from obfuscatune.serving.request import settings
from obfuscatune.serving.sampling import Settings
from obfuscatune.training.completion import Completion
from obfuscatune.training.data import ROLES, Prompt

MAX_PROMPTS = 256
MAX_PROMPT_BYTES = 1 << 20
MAX_TOKENS = 65_536
SAMPLING = ("seed", "stop", "temperature", "top_p")  # as OpenAI names them, and with their meaning


@dataclass
class Query:
    """Prompts of a party on their way to the thread that has the model, and the answer on its way back. Secret.

    Attributes:
        job: digest. party: fingerprint. settings: how each prompt is completed. streaming: whether :meth:`next` gives
            the one completion's text as it comes.
        completions: once they are done. error: why there are none. done: nothing more will come.
    """

    job: str
    party: str
    prompts: list[Prompt] = field(repr=False)
    settings: Settings = field(repr=False)
    streaming: bool = False
    completions: list[Completion] = field(default_factory=list, repr=False)
    error: BaseException | None = field(default=None, repr=False)
    done: bool = False
    left: bool = False
    sent: int = 0  # characters of the text that the party has got
    _taken: bool = field(default=False, repr=False)
    _text: str = field(default="", repr=False)
    _tokens: int = field(default=0, repr=False)
    _changed: threading.Condition = field(default_factory=threading.Condition, repr=False)

    @property
    def question(self) -> str:
        """A digest of all that decides the answer: asked twice, it is the same question."""
        chosen = self.settings
        sampling = [chosen.temperature, chosen.top_p, chosen.seed] if chosen.temperature > 0 else []
        parts = [self.job, self.party, list(self.prompts), chosen.longest, list(chosen.stop), sampling]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def under_way(self) -> bool:
        """Whether it waits or is computed: also where its party has waited long enough, and will ask again."""
        return bool(self.prompts) and not (self.done or self.left)

    # For the thread that has the model

    def take(self) -> bool:
        """Return whether it is to be answered, or else dropped: whoever asked waits no longer."""
        with self._changed:
            self._taken = True
            return bool(self.prompts) and not self.left

    def show(self, piece: str, tokens: int) -> None:
        """Let the party have a piece of the text, after so many tokens; what was not fetched before is joined to it."""
        with self._changed:
            self._text, self._tokens = self._text + piece, tokens
            self._changed.notify_all()

    def withhold(self) -> int:
        """Let the party have no more of the text than it has got, and return how many characters that is."""
        with self._changed:
            self._text = ""
            return self.sent

    def finish(self, completions: Sequence[Completion]) -> None:
        """It is answered."""
        self._end(list(completions), None)

    def fail(self, error: BaseException) -> None:
        """It is not answered, and this is why."""
        self._end([], error)

    def _end(self, completions: list[Completion], error: BaseException | None) -> None:
        with self._changed:
            self.completions, self.error, self.done = completions, error, True
            self._changed.notify_all()

    # For the thread of the party's connection

    def next(self, seconds: float) -> tuple[str, int] | None:
        """Wait for text that was not fetched yet, and return it with the tokens so far; None at the end, or in time."""
        with self._changed:
            self._changed.wait_for(lambda: self.done or self._text, max(0.0, seconds))
            text, self._text = self._text, ""
            self.sent += len(text)
            return (text, self._tokens) if text else None

    def wait(self, seconds: float) -> bool:
        """Wait until it is done, and return whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: self.done, seconds)

    def drop(self) -> None:
        """Nobody waits now: forget the prompts, unless they are being answered, which is then remembered."""
        with self._changed:
            if not self._taken:
                self.prompts.clear()

    def leave(self) -> None:
        """Whoever asked has left: nothing more of it is computed."""
        self.drop()
        self.left = True


def read_settings(fields: Mapping[str, Any]) -> Settings:
    """Return how a query wants its prompts completed: ``max_new_tokens``, and ``sampling`` with fields of `SAMPLING`.

    A query that samples names its seed: so the answer is one and the same however often it is asked for, and asking
    again gives nothing away that was not paid for.

    Raises:
        UsageError: a field of another name, type or range, or no seed.
    """
    tokens, sampling = fields.get("max_new_tokens"), fields.get("sampling", {})
    if type(tokens) is not int or not 1 <= tokens <= MAX_TOKENS:
        raise UsageError("max_new_tokens", expected=f"1 to {MAX_TOKENS}")
    if not isinstance(sampling, dict) or not set(sampling) <= set(SAMPLING):
        raise UsageError("sampling with other fields", expected=", ".join(SAMPLING))
    problem = ""
    try:
        chosen = settings({**sampling, "max_tokens": tokens}, Defaults(), ServerLimits(max_new_tokens=MAX_TOKENS))
    except Refusal as refusal:  # its text has names and ranges, and no value
        problem = refusal.message
    if problem:
        raise UsageError(f"sampling: {problem}")
    if chosen.temperature > 0 and chosen.seed is None:
        raise UsageError("sampling without a seed", expected="seed: an integer of 64 bits", hint="draw one at random")
    return chosen


def read_prompts(payload: bytes) -> list[Prompt]:
    """Return the prompts of a query: a JSON list of texts, or of lists of messages with a role and a content.

    Raises:
        FormatError: it is too long, or none; nothing of it is in the message.
    """
    problem: FormatError | None = None
    if len(payload) > MAX_PROMPT_BYTES:
        raise FormatError("prompts are too long", got=f"{len(payload)} bytes", expected=f"at most {MAX_PROMPT_BYTES}")
    prompts: Any = None
    try:
        prompts = json.loads(payload.decode("utf-8"))
    except (ValueError, RecursionError):
        problem = FormatError("prompts are not JSON")
    if problem is not None:  # outside the handler: the decoder's exception holds the text
        raise problem
    fits = isinstance(prompts, list) and 1 <= len(prompts) <= MAX_PROMPTS
    found = [_prompt(prompt) for prompt in prompts] if fits else []
    if not found or None in found:
        raise FormatError("not a list of prompts", expected=f"1 to {MAX_PROMPTS} texts, or lists of messages")
    return [prompt for prompt in found if prompt is not None]


def _prompt(value: Any) -> Prompt | None:
    if _is_text(value):
        return str(value)
    if not isinstance(value, list) or not value:
        return None
    turns = []
    for message in value:
        if not isinstance(message, dict) or set(message) != {"role", "content"} or message["role"] not in ROLES:
            return None
        # An answer in the history may be empty, where the model had ended it at once.
        if not _is_text(message["content"], may_be_empty=message["role"] == "assistant"):
            return None
        turns.append((message["role"], message["content"]))
    return tuple(turns)


def _is_text(value: Any, *, may_be_empty: bool = False) -> bool:
    """Whether it is a text with something in it, and no half of a surrogate pair, which no tokenizer takes."""
    fits = isinstance(value, str) and (may_be_empty or bool(value))
    return fits and not any("\ud800" <= char <= "\udfff" for char in value)
