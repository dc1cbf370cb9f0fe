"""Waiting for a disk that takes nothing: the job pauses, the enclave lives, and it goes on when there is room.

The enclave must not end for it: where the platform has no sealing key (TDX), its identity and all that is sealed to it
would be lost. What is to be written stays in memory meanwhile.
"""

import logging
from collections.abc import Callable
from typing import TypeVar

from obfuscatune.errors import StorageError
from obfuscatune.service.book import Book

logger = logging.getLogger(__name__)
T = TypeVar("T")
_FIRST_SECONDS, _MOST_SECONDS = 0.5, 30.0


class Stopped(SystemExit):
    """The operator has stopped the enclave while it waited; a running job goes on at the next start."""


class Patience:
    """Does what needs the disk, again and again until the disk takes it.

    Args:
        book: of the jobs. stopped: whether to give up waiting; looked at under the book's lock.
    """

    def __init__(self, book: Book, stopped: Callable[[], bool]) -> None:
        self._book, self._stopped = book, stopped

    def __call__(self, act: Callable[[], T], job: str | None = None) -> T:
        """Return what ``act`` does; it must leave nothing behind where it raises StorageError.

        Raises:
            Stopped: the operator stops the enclave. Whatever else ``act`` raises.
        """
        waited = False
        while True:
            try:
                result = act()
            except StorageError as error:
                logger.warning("waiting for the disk: %s", error)
                if job is not None:
                    self._book.paused(job, True)
                waited = True
                self._wait()
                if job is not None:
                    self._book.paused(job, False)
                continue
            if waited:
                logger.info("the disk has room again")
            return result

    def _wait(self) -> None:
        """Wait until the state can be committed and there is room beside it."""
        seconds = _FIRST_SECONDS
        while True:
            with self._book.changed:
                if self._book.changed.wait_for(self._stopped, seconds):
                    raise Stopped(0)
            try:
                self._book.store.require_disk(0)
                self._book.commit()
                return
            except StorageError:
                seconds = min(2 * seconds, _MOST_SECONDS)
