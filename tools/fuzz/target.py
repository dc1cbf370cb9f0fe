"""A parser of bytes that another party sends, as a function of bytes, with valid inputs to start from.

A parser may return, or raise an error of the package. Everything else is a finding: another exception, a message with a
control character in it (which would forge lines of a log), or one that goes on for pages.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

from obfuscatune.errors import ObfuscatuneError

MAX_MESSAGE = 4000


class Finding(Exception):  # noqa: N818 - a result
    """A parser raised an error of the package that it should not have raised so."""


@dataclass(frozen=True)
class Target:
    """A parser.

    Attributes:
        parse: what it does with bytes. seeds: inputs that it takes. refused: others, of the right form, to start from.
        strict: no input but ``seeds`` may be taken (they are signed or encrypted).
    """

    parse: Callable[[bytes], object]
    seeds: tuple[bytes, ...]
    strict: bool = False
    refused: tuple[bytes, ...] = ()

    @property
    def inputs(self) -> tuple[bytes, ...]:
        """All inputs to start from."""
        return self.seeds + self.refused

    def run(self, data: bytes) -> bool:
        """Return whether ``data`` is taken; let everything through that is a finding."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.parse(data)
        except ObfuscatuneError as error:
            text = str(error)
            if len(text) > MAX_MESSAGE or not text.replace("\n", "").isprintable():
                raise Finding(
                    f"message of {len(text)} characters, or with one that does not print: {text[:200]!a}"
                ) from None
            return False
        return True
