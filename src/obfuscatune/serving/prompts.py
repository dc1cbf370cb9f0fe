"""Texts and messages of requests to tokens."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from obfuscatune.errors import UsageError
from obfuscatune.serving.refusal import Refusal
from obfuscatune.training.chat import prompt_tokens, spells_special
from obfuscatune.training.encoding import prompt_text_tokens


class Prompts:
    """Texts and messages to tokens.

    A message that spells a special token is refused, see `spells_special`. A bare text is the client's own in all its
    parts, and its special tokens are special, as in ``obfuscatune generate``.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # a tokenizer keeps state between calls

    def text(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        with self._lock:
            return prompt_text_tokens(self._tokenizer, text)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the tokens of messages and of the header of the answer; raises Refusal."""
        with self._lock:
            return self._chat(messages)

    def _chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        # OpenAI's newer name of a system's role: a template that knows the older one alone leaves the message out.
        system = "developer" if "developer" in str(self._tokenizer.chat_template) else "system"
        roles = {"developer": system}
        turns = [(roles.get(message["role"], message["role"]), message["content"]) for message in messages]
        number = spells_special(self._tokenizer, turns)
        if number is not None:
            name = f"messages[{number}].content"
            raise Refusal(400, f"{name} spells a special token", code="invalid_value", param=name)
        if not self._tokenizer.chat_template:
            text = "the model has no chat template: /v1/completions goes on with a text"
            raise Refusal(400, text, code="chat_template", param="messages")
        try:
            return prompt_tokens(self._tokenizer, turns, "messages")
        except UsageError as error:
            text = f"{error.what}; {error.hint}" if error.hint else error.what
        raise Refusal(400, text, code="chat_template", param="messages")
