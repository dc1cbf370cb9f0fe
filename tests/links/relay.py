"""A relay in front of an honest worker that does to its replies what a faulty worker, or whoever is it, would do.

The enclave meets the relay in the place of the worker: over a unix socket, TCP, or TLS with the worker's identity.
Behind it is a worker's real process. One request is under way at a time, as a worker answers one after another.
"""

import contextlib
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from obfuscatune.errors import ProtocolError
from obfuscatune.protocol.address import Address, address_of, close_listener, connect, listen
from obfuscatune.protocol.frames import PREFIX, TensorSpec, decode_frame, decode_prefix, encode_head
from obfuscatune.protocol.tls import accept_tls

from ..worker.processes import children

PATIENCE = 60  # seconds
PULSE = 0.02  # seconds between two bytes of a trickle: a reply of a kilobyte takes twenty
PAUSE = 0.2  # seconds that a slow worker stops within a reply

Fault = Callable[["Relay", bytes], None]  # does what it likes with a request and its reply


class Relay:
    """One worker's place.

    Args:
        at: where the enclave connects. behind: where the honest worker listens, and the process that does.
        context: of TLS, with the identity that the relay shows.

    Attributes:
        fault: what is done to the requests for which ``due`` is true of the fields; once, where ``once`` is set.
        struck: when that was done, in seconds of the monotonic clock.
    """

    def __init__(self, at: Address, behind: Address, process: int, context: ssl.SSLContext | None = None) -> None:
        self.fault, self.due, self.once = honest, _never, True
        self.struck: list[float] = []
        self._behind, self._process, self._context = behind, process, context
        self._at, self._listener = at, listen(at)
        self._leaving = threading.Event()
        self._enclave: socket.socket
        self._worker: socket.socket
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def arm(self, fault: Fault, due: Callable[[dict[str, Any]], bool], *, once: bool = True) -> None:
        """Do this to the replies of those requests from now on."""
        self.fault, self.due, self.once, self.struck = fault, due, once, []

    @property
    def port(self) -> int:
        """Where it listens, of TCP."""
        return address_of(self._listener).port

    @property
    def session(self) -> int:
        """The process of the worker's session, which a signal hits and the worker outlives."""
        *_, last = (child for inner in children(self._process) for child in children(inner))
        return last

    def signal(self, number: signal.Signals) -> int:
        """Send the session's process a signal, wait until it has stopped or is gone, and return its id."""
        pid = self.session
        os.kill(pid, number)
        while _state(pid) not in "TZX":
            self._leaving.wait(0.005)
        return pid

    def ask(self, request: bytes) -> bytes:
        """Hand a request to the worker, and return its reply; what it says of its queue goes on to the enclave."""
        self._worker.sendall(request)
        while "queued" in decode_frame(reply := _frame(self._worker))[0]:
            self._enclave.sendall(reply)
        return reply

    def answer(self, reply: bytes) -> None:
        """Send the enclave bytes."""
        self._enclave.sendall(reply)

    def hear(self) -> bytes:
        """Wait for what the enclave sends next; nothing where it has left."""
        with contextlib.suppress(OSError):
            return self._enclave.recv(1)
        return b""

    def wait(self, seconds: float) -> bool:
        """Wait so long; True where the relay is to leave."""
        return self._leaving.wait(seconds)

    def close(self) -> None:
        """End it, and the worker's session with it."""
        self._leaving.set()
        self._hang_up()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE)
        close_listener(self._listener, self._at)
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        while True:
            try:
                accepted, _ = self._listener.accept()
            except OSError:
                return
            with contextlib.suppress(OSError, ProtocolError, ValueError):  # one of the two has left
                self._enclave = accepted
                self._open = [accepted]
                if self._context is not None:
                    self._enclave = accept_tls(accepted, self._context, "enclave")
                    self._open = [self._enclave]
                    self._enclave.sendall(encode_head({"id": 0, "ok": True}, [])[0])
                self._worker = connect(self._behind, PATIENCE)
                self._open.append(self._worker)
                while not self._leaving.is_set():
                    self._pass_on(_frame(self._enclave))
            self._hang_up()

    def _pass_on(self, request: bytes) -> None:
        if (self.once and self.struck) or not self.due(decode_frame(request)[0]):
            self.answer(self.ask(request))
            return
        self.struck.append(time.monotonic())
        self.fault(self, request)

    def _hang_up(self) -> None:
        for sock in self._open:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
            sock.close()


def honest(relay: Relay, request: bytes) -> None:
    """Do nothing."""
    relay.answer(relay.ask(request))


def killed(relay: Relay, request: bytes) -> None:
    """Kill the worker between a request and its reply."""
    relay.signal(signal.SIGKILL)
    relay.answer(relay.ask(request))


def cut(relay: Relay, request: bytes) -> None:
    """Kill the worker within a reply."""
    reply = relay.ask(request)
    relay.answer(reply[: len(reply) // 2])
    killed(relay, request)


def stopped(relay: Relay, request: bytes) -> None:
    """Stop the worker: it keeps its connection and answers nothing. Until the enclave is gone; then it is killed."""
    pid = relay.signal(signal.SIGSTOP)
    try:
        assert not relay.hear(), "the enclave sends more to a worker that owes it a reply"
    finally:
        os.kill(pid, signal.SIGKILL)


def trickling(relay: Relay, request: bytes) -> None:
    """Send a reply byte by byte, so that something comes all the time and the frame never ends."""
    for byte in relay.ask(request):
        relay.answer(bytes([byte]))
        if relay.wait(PULSE):
            return


def lying(relay: Relay, request: bytes) -> None:
    """Send the right reply with the sign of every number changed: names, shapes and dtypes are the right ones."""
    fields, tensors = decode_frame(relay.ask(request))
    specs = [spec for spec, _ in tensors.values()]
    lies = [-_tensor(spec, raw) for spec, raw in tensors.values()]
    assert any(lie.any() for lie in lies)
    relay.answer(encode_head(fields, specs)[0] + b"".join(lie.numpy().tobytes() for lie in lies))


def slow(relay: Relay, request: bytes) -> None:
    """Stop for a while in the middle of a reply."""
    reply = relay.ask(request)
    relay.answer(reply[: len(reply) // 2])
    relay.wait(PAUSE)
    relay.answer(reply[len(reply) // 2 :])


def strange(relay: Relay, request: bytes) -> None:
    """Answer as a web server would, which is no worker."""
    relay.answer(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")


def dumb(relay: Relay, request: bytes) -> None:
    """Take everything and say nothing, as some services do that are no worker."""
    relay.wait(PATIENCE)


@contextlib.contextmanager
def relay(at: Address, behind: Address, process: int, context: ssl.SSLContext | None = None) -> Iterator[Relay]:
    """A relay for as long as a test takes."""
    made = Relay(at, behind, process, context)
    try:
        yield made
    finally:
        made.close()


def _never(fields: dict[str, Any]) -> bool:
    return False


def _frame(sock: socket.socket) -> bytes:
    head = _exactly(sock, PREFIX.size)
    return head + _exactly(sock, sum(decode_prefix(head)))


def _exactly(sock: socket.socket, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        part = sock.recv(size - len(found))
        if not part:
            raise ConnectionResetError
        found += part
    return bytes(found)


def _tensor(spec: TensorSpec, raw: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(raw), dtype=spec.dtype).view(spec.shape)


def _state(pid: int) -> str:
    """Of a process, as /proc has it; X where it is gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X"
