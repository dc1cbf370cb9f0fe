"""Work in a thread of its own, which may stall: asyncio's own threads are few, and are waited for at the end."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

from obfuscatune.errors import BusyError

Result = TypeVar("Result")


def in_thread(work: Callable[[], Result]) -> "asyncio.Future[Result]":
    """Return what a thread of its own will return; one that stalls keeps neither another one nor the process's end.

    Where the machine gives no thread, that is a BusyError of what is returned: whoever holds a place until it is done
    gives it back then, too.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def settle(result: Result | None, error: BaseException | None) -> None:
        if not future.cancelled():
            future.set_result(result) if error is None else future.set_exception(error)  # type: ignore[arg-type]

    def run() -> None:
        result, failed = None, None
        try:
            result = work()
        except BaseException as error:  # whatever it is, whoever waits must hear of it
            failed = error
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever waited
            loop.call_soon_threadsafe(lambda: settle(result, failed))  # no arguments, which asyncio might log

    try:
        threading.Thread(target=run, name="asking", daemon=True).start()
    except RuntimeError:
        future.set_exception(BusyError("this machine gives no more threads", hint="ask again when others have ended"))
    return future
