"""A session's process: the handshake, the wait for a place, the limits, then the session."""

import contextlib
import logging
import select
import socket
import ssl
import struct
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from obfuscatune.errors import ConnectionClosedError, ProtocolError
from obfuscatune.protocol.connection import Connection
from obfuscatune.protocol.limits import Limits
from obfuscatune.protocol.tls import accept_tls, reason
from obfuscatune.worker.budget import limit_process
from obfuscatune.worker.parallel import Group
from obfuscatune.worker.server import error_reply, serve_connection
from obfuscatune.worker.torchrun import rank_and_size

logger = logging.getLogger(__name__)

FULL = 2**32 - 1
AHEAD = struct.Struct("<I")
_SIGN_OF_LIFE_SECONDS = 10.0
_LEAVING_SECONDS = 0.5  # an enclave that closed and connects again may arrive before its old session is gone
_WARM = 512  # rows of a product that all threads take part in


@dataclass(frozen=True)
class Service:
    """What every session gets: a device, threads, bytes of memory, and the TLS context of a ``tls://`` worker."""

    device: torch.device
    threads: int | None
    budget: int
    context: ssl.SSLContext | None = None


def serve_child(sock: socket.socket, control: socket.socket, service: Service, number: int) -> None:
    """Serve one connection to its end. Until its enclave has greeted, the acceptor bounds the time."""
    limits = Limits(max_payload_bytes=min(Limits().max_payload_bytes, service.budget))
    sock.setblocking(True)
    if service.context is not None:
        try:
            sock = accept_tls(sock, service.context, "enclave")
        except (OSError, ProtocolError) as error:
            why = reason(error) if isinstance(error, OSError) else error.what
            logger.warning("session %d: refused in the TLS handshake: %s", number, why)
            with contextlib.suppress(OSError):
                sock.close()
            return
    connection = Connection(sock, limits=limits, peer="enclave")
    if service.context is not None:
        try:
            connection.send({"id": 0, "ok": True})  # under TLS 1.3 nothing else tells an enclave that it is known here
        except ConnectionClosedError:
            return

    def admit(call: Any) -> bool:
        connection.settimeout(_SIGN_OF_LIFE_SECONDS * 3)  # for the frames of the queue to be taken
        control.send(b"g")
        if not _wait(connection, sock, control, call):
            return False
        _prepare(service)
        return True

    join = partial(Group.join, service.device) if rank_and_size()[1] > 1 else None
    serve_connection(connection, service.device, budget=service.budget, admit=admit, join=join)


def _wait(connection: Connection, sock: socket.socket, control: socket.socket, call: Any) -> bool:
    """Wait for a place and tell the enclave where it stands; False where it leaves, or there is no room."""
    poll = select.poll()
    for each in (sock, control):
        poll.register(each, select.POLLIN)
    ahead: int | None = None
    quiet_until = time.monotonic() + _LEAVING_SECONDS
    while True:
        quiet = quiet_until - time.monotonic()
        ready = dict(poll.poll(1000 * (quiet if quiet > 0 else _SIGN_OF_LIFE_SECONDS)))
        if control.fileno() in ready:
            said = control.recv(1024)
            if len(said) < AHEAD.size:
                return False
            (ahead,) = AHEAD.unpack(said[-AHEAD.size :])
            if ahead == 0:
                return True
        elif sock.fileno() in ready:
            return False  # it has left; or it says more before it was answered
        if ahead != FULL and time.monotonic() < quiet_until:
            continue
        try:
            if ahead == FULL:
                connection.send(error_reply(None, "busy", "the worker's queue is full; try again later"))
                return False
            if ahead is not None:
                connection.send({"id": call if type(call) is int else None, "queued": ahead})
        except (ConnectionClosedError, TimeoutError):
            return False


def _prepare(service: Service) -> None:
    """Start the threads and the device, so that they do not count, then bound what the process may take."""
    if service.threads is not None:
        torch.set_num_threads(service.threads)
    warm = torch.ones(_WARM, _WARM, device=service.device)
    (warm @ warm).add_(1).sum().item()
    del warm
    limit_process(service.budget, service.device)
