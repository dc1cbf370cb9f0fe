"""What other libraries say, without their words: an error of theirs may quote a row, a prompt or a file.

The one place where errors that are not ours reach a terminal or a log. Told are the class and the place; the words of
our own errors, which hold no content, are told by whoever catches them.
"""

import contextlib
import logging
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from obfuscatune.errors import ObfuscatuneError

_OWN = "obfuscatune"
_MOST_KINDS = 4  # of a chain of causes


def without_content(error: BaseException) -> str:
    """Say where another library failed, and not what it says: that may hold a row or a prompt."""
    frames = traceback.extract_tb(_first(error).__traceback__)
    own = [frame for frame in frames if f"{os.sep}{_OWN}{os.sep}" in frame.filename]
    places = [f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}" for frame in [*own[-2:], *frames[-1:]]]
    what = f"unexpected {_kinds(error)} (at {', '.join(dict.fromkeys(places))})"
    hint = "please report this line; the error's own words are left out, because they may hold private content"
    return f"{what}\nhint: {hint}"


@contextlib.contextmanager
def quieted() -> Iterator[None]:
    """Keep Python and other libraries from printing or logging what an error says.

    That are: what ends a thread or a finalizer, which Python prints; exceptions in records of logging, with or without
    their traces; and all words of other libraries' records of errors (asyncio's have the exception in the text).
    """
    hooks = threading.excepthook, sys.unraisablehook, logging.getLogRecordFactory()
    threading.excepthook = lambda ended: _complain(ended.exc_value or ended.exc_type())
    sys.unraisablehook = lambda ended: _complain(ended.exc_value or ended.exc_type())

    def make(*arguments: Any, **named: Any) -> logging.LogRecord:
        return _without_words(hooks[2](*arguments, **named))

    logging.setLogRecordFactory(make)
    try:
        yield
    finally:
        threading.excepthook, sys.unraisablehook = hooks[:2]
        logging.setLogRecordFactory(hooks[2])


def _without_words(record: logging.LogRecord) -> logging.LogRecord:
    raised = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
    record.exc_info = record.exc_text = record.stack_info = None
    if record.name.partition(".")[0] != _OWN and record.levelno >= logging.ERROR:
        what = "an error" if raised is None else _kinds(raised)
        record.msg, record.args = f"{what} at {Path(record.pathname).name}:{record.lineno}; its words are left out", ()
    elif isinstance(record.args, tuple):
        record.args = tuple(_without_error(argument) for argument in record.args)
    return record


def _without_error(argument: object) -> object:
    foreign = isinstance(argument, BaseException) and not isinstance(argument, ObfuscatuneError)
    return type(argument).__name__ if foreign else argument


def _kinds(error: BaseException) -> str:
    kinds: list[str] = []
    current: BaseException | None = error
    while current is not None and len(kinds) < _MOST_KINDS:
        kinds.append(type(current).__name__)
        current = current.__cause__ or current.__context__
    return ", from ".join(kinds)


def _first(error: BaseException) -> BaseException:
    """The error that all began with, as far as `_kinds` tells of it."""
    for _ in range(_MOST_KINDS - 1):
        error = error.__cause__ or error.__context__ or error
    return error


def _complain(error: BaseException) -> None:
    print(f"error: {without_content(error)}", file=sys.stderr)
