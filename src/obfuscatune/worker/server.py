"""The server: accepts one enclave at a time and answers its requests until it leaves.

Everything of a session is dropped when its connection ends, so that a worker needs no cleaning up between jobs. A
second enclave that connects meanwhile is told so and sent away. A request that fails is answered with its error;
bytes that break the framing end the connection, and so does an enclave that connects and says nothing.
"""

import contextlib
import logging
import socket
import threading
from typing import Any

import torch

from obfuscatune.errors import ConnectionClosedError, ProtocolError, UsageError
from obfuscatune.protocol.connection import Connection
from obfuscatune.protocol.limits import Limits
from obfuscatune.worker.session import WorkerSession

logger = logging.getLogger(__name__)

_LEAVING_SECONDS = 1.0  # an enclave that closed and connects again may arrive before its old session is gone
_GREETING_SECONDS = 30.0  # how long a new connection may be silent: it holds the worker, or a thread to send it away
_MAX_MESSAGE_CHARS = 500
# Torch's messages in these name shapes and dtypes; a value of an activation is in none of them.
_FAILURES = (RuntimeError, ValueError, TypeError, KeyError, IndexError)


def serve_connection(connection: Connection, device: torch.device) -> None:
    """Serve one enclave until it closes the connection or breaks the protocol.

    The connection's timeout holds for the first request; between later ones an enclave may take as long as it likes.
    """
    session = WorkerSession(device)
    last = 0
    with contextlib.closing(connection):
        while True:
            try:
                header, tensors = connection.receive()
            except ConnectionClosedError:
                return
            except (ProtocolError, TimeoutError) as error:
                logger.warning("connection ended: %s", error)
                return
            if last == 0:
                connection.settimeout(None)
            number = header.get("id")
            outputs: dict[str, torch.Tensor] = {}
            if type(number) is int and number > last:
                last = number
                reply, outputs = _answer(session, number, header, tensors)
            else:  # the text quotes nothing of a value that may be anything
                reply = _error(None, "refused", f"id: expected an integer above {last}")
            try:
                _reply(connection, reply, outputs)
            except ConnectionClosedError:
                return


def _reply(connection: Connection, reply: dict[str, Any], outputs: dict[str, torch.Tensor]) -> None:
    try:
        connection.send(reply, outputs)
    except UsageError:  # beyond the limits of a frame; nothing of it was sent, and this short one always fits
        connection.send(_error(reply["id"], "failed", "the reply is beyond the limits of a frame"))


def _answer(
    session: WorkerSession, call: int, header: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        reply, outputs = session.handle(header, tensors)
    except ProtocolError as error:
        return _error(call, "refused", str(error)), {}
    except _FAILURES as error:
        return _error(call, "failed", f"{type(error).__name__}: {error}"), {}
    except Exception as error:  # the boundary of the server: whatever one request provokes, the next one is served
        return _error(call, "failed", type(error).__name__), {}
    return {"id": call, "ok": True, **reply}, outputs


def _error(call: Any, code: str, message: str) -> dict[str, Any]:
    return {"id": call, "ok": False, "error": code, "message": message[:_MAX_MESSAGE_CHARS]}


def serve_forever(listener: socket.socket, device: torch.device, limits: Limits) -> None:
    """Accept enclaves one after another; a second one at the same time is refused with a message."""
    busy = threading.Lock()
    try:
        while True:
            accepted, _ = listener.accept()
            connection = Connection(accepted, limits=limits, peer="enclave")
            if busy.acquire(timeout=_LEAVING_SECONDS):
                threading.Thread(target=_serve_and_release, args=(connection, device, busy), daemon=True).start()
            else:
                threading.Thread(target=_send_away, args=(connection,), daemon=True).start()
    finally:
        # A session that is ending first ends: the interpreter's exit would unwind its thread, and one that is within
        # torch, freeing tensors, aborts the process then ("terminate called without an active exception").
        busy.acquire(timeout=_LEAVING_SECONDS)


def _send_away(connection: Connection) -> None:
    # Its greeting is read first: closing with unread bytes would reset the connection, and the answer might be lost.
    with contextlib.suppress(ProtocolError, OSError), contextlib.closing(connection):
        connection.settimeout(_GREETING_SECONDS)
        connection.receive()
        connection.send(_error(None, "busy", "another enclave is connected"))


def _serve_and_release(connection: Connection, device: torch.device, busy: threading.Lock) -> None:
    try:
        connection.settimeout(_GREETING_SECONDS)
        serve_connection(connection, device)
    finally:
        busy.release()
