"""Calls of other libraries with private texts: what they raise may hold the text, so only the kind of it is told."""

from types import TracebackType
from typing import Any

from obfuscatune.errors import DataError, ObfuscatuneError

_PASSED = (ObfuscatuneError, KeyboardInterrupt, SystemExit, GeneratorExit)


class Quiet:
    """A context in which whatever else is raised than our own errors becomes a `DataError` with its class alone.

    A panic of Rust is no ``Exception``, and is caught too.

    Args:
        what: the beginning of the message. details: of the error.
    """

    def __init__(self, what: str, **details: Any) -> None:
        self._what, self._details = what, details

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, _PASSED):
            return
        fault = DataError(f"{self._what} with a {kind.__name__}", **self._details)
        try:
            raise fault
        finally:
            fault.__context__ = None  # which Python has just set to the library's exception
