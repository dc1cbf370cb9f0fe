"""The server of one session: answers an enclave's requests until it leaves.

A request that fails is answered with its error; bytes that break the framing end the connection. The first frame of a
connection has no payload, so that who has not greeted makes the worker read 256 KiB at most.
"""

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import torch

from obfuscatune.errors import ConnectionClosedError, ProtocolError, UsageError
from obfuscatune.protocol.connection import Connection
from obfuscatune.worker.budget import is_out_of_memory
from obfuscatune.worker.parallel import ALONE, Group, GroupError
from obfuscatune.worker.session import WorkerSession
from obfuscatune.worker.transfer import pins

logger = logging.getLogger(__name__)

_MAX_MESSAGE_CHARS = 500
# Torch's messages in these name shapes and dtypes; a value of an activation is in none of them.
_FAILURES = (RuntimeError, ValueError, TypeError, KeyError, IndexError)


def serve_connection(
    connection: Connection,
    device: torch.device,
    *,
    budget: int | None = None,
    admit: Callable[[Any], bool] | None = None,
    join: Callable[[], Group] | None = None,
) -> None:
    """Serve one enclave until it closes the connection or breaks the protocol.

    The connection's timeout holds for the first request; between later ones an enclave may take as long as it likes.

    Args:
        budget: bytes that the session may hold; see `WorkerSession`.
        admit: called once, with the id of the first request before that is answered; False ends the session.
        join: called once after that; returns the group that the session runs in.
    """
    session: WorkerSession | None = None
    last = 0
    with contextlib.closing(connection), contextlib.ExitStack() as ending:
        while True:
            try:
                header, tensors = connection.receive(max_payload=0 if session is None else None)
            except ConnectionClosedError:
                return
            except (ProtocolError, TimeoutError) as error:
                logger.warning("connection ended: %s", error)
                return
            number = header.get("id")
            if session is None:
                if admit is not None and not admit(number):
                    return
                connection.settimeout(None)
                group = ALONE if join is None else join()
                ending.callback(group.leave_session)
                connection.pin_memory = pins(device)
                session = WorkerSession(device, budget, group, connection if connection.shares_memory else None)
            outputs: dict[str, torch.Tensor] = {}
            if type(number) is int and number > last:
                last = number
                reply, outputs = _answer(session, number, header, tensors)
            else:  # the text quotes nothing of a value that may be anything
                reply = error_reply(None, "refused", f"id: expected an integer above {last}")
            header, tensors = {}, {}  # the next request may need the memory
            try:
                _reply(connection, reply, outputs)
            except ConnectionClosedError:
                return
            if reply.get("error") == "lost":
                return


def _reply(connection: Connection, reply: dict[str, Any], outputs: dict[str, torch.Tensor]) -> None:
    try:
        connection.send(reply, outputs)
    except UsageError:  # beyond the limits of a frame; nothing of it was sent, and this short one always fits
        connection.send(error_reply(reply["id"], "failed", "the reply is beyond the limits of a frame"))


def _answer(
    session: WorkerSession, call: int, header: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        reply, outputs = session.handle(header, tensors)
    except ProtocolError as error:
        return error_reply(call, "refused", str(error)), {}
    except GroupError as error:  # the others are in the middle of something
        return error_reply(call, "lost", str(error)), {}
    except Exception as error:  # the boundary of the server: whatever one request provokes, the next one is served
        if is_out_of_memory(error):
            return error_reply(call, "failed", _out_of_memory(session)), {}
        known = isinstance(error, _FAILURES)
        return error_reply(call, "failed", f"{type(error).__name__}: {error}" if known else type(error).__name__), {}
    return {"id": call, "ok": True, **reply}, outputs


def _out_of_memory(session: WorkerSession) -> str:
    budget, held = session.ledger.budget, session.ledger.held
    given = "no memory is left on the worker" if budget is None else "out of the session's memory budget"
    return f"{given}: this request needs more room than is left beside {held} bytes that are held" + (
        "" if budget is None else f", of {budget}"
    )


def error_reply(call: Any, code: str, message: str) -> dict[str, Any]:
    """Return the fields of a reply that tells an error."""
    return {"id": call, "ok": False, "error": code, "message": message[:_MAX_MESSAGE_CHARS]}
