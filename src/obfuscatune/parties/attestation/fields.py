"""Reading of binary formats, field after field; every length is checked before it is used."""

from collections.abc import Iterator
from contextlib import contextmanager

from obfuscatune.errors import FormatError, ObfuscatuneError


@contextmanager
def parsing(what: str) -> Iterator[None]:
    """Turn whatever a parser of hostile bytes raises into FormatError: libraries raise more than they document.

    Panics of those in Rust are no Exception.
    """
    problem = ""
    try:
        yield
    except (ObfuscatuneError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        problem = type(error).__name__
    if problem:
        raise FormatError(f"{what} cannot be read", got=f"a {problem} in the parser")


class Fields:
    """Little-endian fields of ``data`` from ``at`` on; ``what`` names the data in errors.

    All methods raise FormatError where the data end too early or too late.
    """

    def __init__(self, data: bytes, what: str, at: int = 0) -> None:
        self._data, self._what, self.at = data, what, at

    @property
    def left(self) -> int:
        """Bytes that were not read yet."""
        return len(self._data) - self.at

    def take(self, size: int) -> bytes:
        """Return the next ``size`` bytes."""
        if size > self.left:
            raise FormatError(f"{self._what} is cut", got=f"{self.left} bytes", expected=f"{size} more")
        part = self._data[self.at : self.at + size]
        self.at += size
        return part

    def number(self, size: int) -> int:
        """Return the next unsigned integer of ``size`` bytes."""
        return int.from_bytes(self.take(size), "little")

    def end(self) -> None:
        """Check that nothing is left."""
        if self.left:
            raise FormatError(f"a length in the {self._what} does not fit", got=f"{self.left} bytes too many")
