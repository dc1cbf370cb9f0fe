"""The server: accepts one enclave at a time and answers its requests until it leaves.

Everything of a session is dropped when its connection ends, so that a worker needs no cleaning up between jobs. A
second enclave that connects meanwhile is told so and sent away. A request that fails is answered with its error;
bytes that break the framing end the connection.
"""

import contextlib
import logging
import socket
import threading
from typing import Any

import torch

from obfuscatune.errors import ConnectionClosedError, ProtocolError, UsageError
from obfuscatune.protocol import Connection, Limits
from obfuscatune.worker.session import WorkerSession

logger = logging.getLogger(__name__)

_LEAVING_SECONDS = 1.0  # an enclave that closed and connects again may arrive before its old session is gone
_BUSY_SECONDS = 10.0  # how long an enclave that is sent away may take for its greeting


def serve_connection(connection: Connection, device: torch.device) -> None:
    """Serve one enclave until it closes the connection or breaks the protocol."""
    session = WorkerSession(device)
    with contextlib.closing(connection):
        while True:
            try:
                header, tensors = connection.receive()
            except ConnectionClosedError:
                return
            except ProtocolError as error:
                logger.warning("connection ended: %s", error)
                return
            reply, outputs = _answer(session, header, tensors)
            try:
                _reply(connection, reply, outputs)
            except ConnectionClosedError:
                return


def _reply(connection: Connection, reply: dict[str, object], outputs: dict[str, torch.Tensor]) -> None:
    try:
        connection.send(reply, outputs)
    except UsageError as error:  # beyond the limits of a frame; nothing of it was sent
        connection.send({"id": reply["id"], "ok": False, "error": "failed", "message": str(error)})


def _answer(
    session: WorkerSession, header: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    call = header.get("id")
    try:
        reply, outputs = session.handle(header, tensors)
    except ProtocolError as error:
        return {"id": call, "ok": False, "error": "refused", "message": str(error)}, {}
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError) as error:
        # Torch's messages name shapes and dtypes; a value of an activation is in none of these types.
        text = f"{type(error).__name__}: {error}"[:500]
        return {"id": call, "ok": False, "error": "failed", "message": text}, {}
    return {"id": call, "ok": True, **reply}, outputs


def serve_forever(listener: socket.socket, device: torch.device, limits: Limits) -> None:
    """Accept enclaves one after another; a second one at the same time is refused with a message."""
    busy = threading.Lock()
    while True:
        accepted, _ = listener.accept()
        connection = Connection(accepted, limits=limits, peer="enclave")
        if busy.acquire(timeout=_LEAVING_SECONDS):
            threading.Thread(target=_serve_and_release, args=(connection, device, busy), daemon=True).start()
        else:
            threading.Thread(target=_send_away, args=(connection,), daemon=True).start()


def _send_away(connection: Connection) -> None:
    # Its greeting is read first: closing with unread bytes would reset the connection, and the answer might be lost.
    with contextlib.suppress(ProtocolError, OSError), contextlib.closing(connection):
        connection.settimeout(_BUSY_SECONDS)
        connection.receive()
        connection.send({"id": None, "ok": False, "error": "busy", "message": "another enclave is connected"})


def _serve_and_release(connection: Connection, device: torch.device, busy: threading.Lock) -> None:
    try:
        serve_connection(connection, device)
    finally:
        busy.release()
