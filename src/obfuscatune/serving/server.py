"""uvicorn with h11, within limits: it has none for headers that never end, and none for open connections."""

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from obfuscatune.errors import UsageError
from obfuscatune.serving.limits import Limits


class Server(uvicorn.Server):
    """A server of one application; ``run(sockets=[...])`` serves until SIGINT, SIGTERM or ``should_exit``.

    Args:
        certificate, key: PEM files of TLS; without them plain HTTP.
    """

    def __init__(self, app: ASGIApp, limits: Limits, *, certificate: str | None = None, key: str | None = None) -> None:
        # It logs clients' faults, which are no news, and tracebacks, whose last line may hold a prompt.
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
        config = uvicorn.Config(
            app,
            http=_limited(limits),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=limits.connections,
            timeout_keep_alive=limits.keep_alive_seconds,
            timeout_graceful_shutdown=limits.drain_seconds,
            h11_max_incomplete_event_size=limits.header_bytes,
            ssl_certfile=certificate,
            ssl_keyfile=key,
        )
        try:
            config.load()
        except OSError as error:  # of ssl too
            raise UsageError("certificate or key cannot be used", got=type(error).__name__, where=certificate) from None
        super().__init__(config)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End at the first SIGINT or SIGTERM; uvicorn's own raises it again afterwards, and the model would not end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def leave(self) -> None:
        """End when what is under way is answered; from any thread."""
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; raises UsageError."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=256)
    except (OSError, OverflowError) as error:
        raise UsageError("cannot listen", got=getattr(error, "strerror", None), where=f"{host}:{port}") from None


def _limited(limits: Limits) -> type[asyncio.Protocol]:
    class Limited(H11Protocol):
        """Closes a connection whose request does not begin, or whose answer is not read, in time (slowloris)."""

        _head: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            # uvicorn answers 503 above the number. Far above it there is not even that: descriptors would run out.
            if len(self.connections) > 2 * limits.connections:
                transport.abort()
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def send_400_response(self, msg: str) -> None:
            # uvicorn looks not whether an answer has begun, nor keeps the application from a second one: both raise.
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                super().send_400_response(msg)
            else:
                self.transport.abort()
            if self.cycle is not None:
                self.cycle.disconnected = True
                self.cycle.message_event.set()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unwatch()
            self.resume_writing()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            self._unread = self._unread or self.loop.call_later(limits.send_seconds, self.transport.abort)
            super().pause_writing()

        def resume_writing(self) -> None:
            if self._unread is not None:
                self._unread.cancel()
                self._unread = None
            super().resume_writing()

        def _watch(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self._unwatch()  # a request has begun, and the guard watches its body
            elif self._head is None and not self.transport.is_closing():
                self._head = self.loop.call_later(limits.head_seconds, self.transport.abort)

        def _unwatch(self) -> None:
            if self._head is not None:
                self._head.cancel()
                self._head = None

    return Limited
