"""uvicorn with h11, within limits: it has none for headers that never end, and none for open connections."""

import asyncio
import contextlib
import functools
import logging
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from obfuscatune.errors import UsageError
from obfuscatune.protocol.hostport import format_host_port, listen_fault, listen_tcp
from obfuscatune.serving.limits import ServerLimits


class Server(uvicorn.Server):
    """A server of one application; ``run(sockets=[...])`` serves until SIGINT, SIGTERM or ``should_exit``.

    Args:
        certificate, key: PEM files of TLS; without them plain HTTP.
        give_up: called in the event loop, at a shutdown, when the time is over for what is under way.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: ServerLimits,
        *,
        certificate: str | None = None,
        key: str | None = None,
        give_up: Callable[[], None] = lambda: None,
    ) -> None:
        self._limits, self._give_up = limits, give_up
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
            timeout_graceful_shutdown=limits.drain_seconds + limits.flush_seconds,
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

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections, in place of uvicorn's own way, which gives TLS a minute and does not count it."""
        config, loop = self.config, asyncio.get_running_loop()

        def protocol() -> asyncio.Protocol:
            made: asyncio.Protocol = config.http_protocol_class(  # type: ignore[call-arg]
                config=config, server_state=self.server_state, app_state={}, _loop=loop
            )
            return made

        connections = self.server_state.connections
        accepting = [Accepting(one, protocol, config.ssl, connections, self._limits) for one in sockets or ()]
        self.servers = accepting  # type: ignore[assignment]
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer what is under way, for a time; then `give_up` has the rest told that it is not."""
        timer = asyncio.get_running_loop().call_later(self._limits.drain_seconds, self._give_up)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def leave(self) -> None:
        """End when what is under way is answered; from any thread."""
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; raises UsageError."""
    try:
        return listen_tcp(host, port, backlog=256)
    except OSError as error:
        raise listen_fault(error, format_host_port(host, port)) from None


class Accepting:
    """Accepts the connections of a listening socket; those count too whose TLS has not begun.

    uvicorn answers 503 above the limit of connections. Twice above it there is not even that: descriptors would run
    out, and the good clients of other services on the machine with them.
    """

    def __init__(
        self,
        listener: socket.socket,
        protocol: Callable[[], asyncio.Protocol],
        tls: ssl.SSLContext | None,
        open_connections: set[Any],
        limits: ServerLimits,
    ) -> None:
        self._listener, self._protocol, self._tls = listener, protocol, tls
        self._open, self._limits = open_connections, limits
        self._beginning: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        listener.setblocking(False)
        self._resume()

    def close(self) -> None:
        """Accept no more, and drop those that have not begun."""
        self._loop.remove_reader(self._listener)
        if self._pause is not None:
            self._pause.cancel()
        for task in self._beginning:
            task.cancel()

    async def wait_closed(self) -> None:
        """Return when those that have not begun are dropped."""
        await asyncio.gather(*self._beginning, return_exceptions=True)

    def _resume(self) -> None:
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError:  # no descriptor is left: look again when some may have been closed
            self._loop.remove_reader(self._listener)
            self._pause = self._loop.call_later(0.5, self._resume)
            return
        if len(self._open) + len(self._beginning) >= 2 * self._limits.connections:
            connection.close()
            return
        connection.setblocking(False)
        task = self._loop.create_task(self._begin(connection))
        self._beginning.add(task)
        task.add_done_callback(functools.partial(self._begun, connection))

    def _begun(self, connection: socket.socket, task: asyncio.Task[None]) -> None:
        self._beginning.discard(task)
        if task.cancelled():  # it may not even have started
            connection.close()

    async def _begin(self, connection: socket.socket) -> None:
        # Whatever goes wrong closes it. That a client says no TLS, or nothing, is no news.
        with contextlib.suppress(OSError):
            await self._loop.connect_accepted_socket(
                self._protocol,
                connection,
                ssl=self._tls,
                ssl_handshake_timeout=None if self._tls is None else self._limits.head_seconds,
            )


def _limited(limits: ServerLimits) -> type[asyncio.Protocol]:
    class Limited(H11Protocol):
        """Closes a connection whose request does not begin, or whose answer is not read, in time (slowloris)."""

        _head: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
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
