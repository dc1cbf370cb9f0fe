"""The process around a worker that listens: it binds the socket, hands it over, and ends the worker with itself.

The socket is inherited as a descriptor: a listening socket goes on accepting in the network it was made in, so that the
worker needs none. What the worker shows on ``tls://`` comes through a pipe: not by an argument, which every user here
can read, nor by the environment or a file.
"""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

from obfuscatune.errors import UsageError
from obfuscatune.protocol.address import Address, close_listener, listen
from obfuscatune.protocol.tls import MAX_CREDENTIALS_BYTES, Credentials
from obfuscatune.protocol.waiting import WAITING
from obfuscatune.worker import sandbox
from obfuscatune.worker.torchrun import ENDING_SECONDS, rank_and_size

_ENDING_SECONDS = 2 * ENDING_SECONDS
# numpy's BLAS, which is never used here, would start threads; the worker forks, and must have one alone.
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}


def run(
    *,
    listen_on: str,
    arguments: Sequence[str] = (),
    device: str = "cpu",
    mode: sandbox.Mode = "auto",
    credentials: Credentials | None = None,
    insecure: bool = False,
) -> int:
    """Serve on an address until interrupted; return the exit status.

    Args:
        arguments: for the worker's own command line, ``--threads`` and the like.
        mode: whether the worker runs in a sandbox: see `sandbox.choose`.
        credentials: what it shows, and whom it lets in; for ``tls://`` and nothing else.
        insecure: whether ``tcp://`` may be other than loopback.

    Under torchrun the process of rank 0 listens, and the others follow it.

    Raises:
        UsageError: bad address, port taken, or no sandbox to be had.
    """
    address = Address.parse(listen_on)
    _check(address, credentials, insecure)
    rank, size = rank_and_size()
    if size > 1:
        mode = _without_sandbox(mode, arguments)
        if rank:  # torchrun goes on watching this process
            command = [sys.executable, "-P", "-m", "obfuscatune.worker", "--follow", "--device", device, *arguments]
            os.execve(sys.executable, command, {**os.environ, **WAITING})  # noqa: S606 - our own interpreter and module
    # A stopped service leaves as after Ctrl-C: its socket file would otherwise stay behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    listener = listen(address)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            return _run(sandbox.choose(mode, device), listener, ["--device", device, *arguments], credentials)
    finally:
        close_listener(listener, address)
    return 0


def _without_sandbox(mode: sandbox.Mode, arguments: Sequence[str]) -> sandbox.Mode:
    """Refuse what a group of processes cannot have: they meet over the network, and serve one session."""
    if mode == "bubblewrap":
        raise UsageError("a worker of several processes has no sandbox: they meet over the network", got=mode)
    if "--max_sessions" in arguments and arguments[list(arguments).index("--max_sessions") + 1] != "1":
        raise UsageError("a worker of several processes serves one session", where="--max_sessions")
    return "none"


def arguments_of(threads: int | None, max_sessions: int, memory_gb: float | None) -> list[str]:
    """Return the options of what a session gets, for the command line of the worker's own process.

    Raises:
        UsageError: one that is out of its range.
    """
    given: dict[str, tuple[float | None, float, float]] = {
        "--threads": (threads, 1, 4096),
        "--max_sessions": (max_sessions, 1, 4096),
        "--memory_gb": (memory_gb, 1e-3, 1e9),
    }
    for name, (value, least, most) in given.items():
        if value is not None and not least <= value <= most:  # NaN is not either
            raise UsageError("option of a worker", got=value, expected=f"{least:g} to {most:g}", where=name)
    return [part for name, (value, *_) in given.items() if value is not None for part in (name, str(value))]


def read_credentials(fd: int) -> Credentials:
    """Read what comes through the pipe, to its end. Raises UsageError."""
    with open(fd, "rb") as pipe:
        return Credentials.from_bytes(pipe.read(MAX_CREDENTIALS_BYTES))


def _check(address: Address, credentials: Credentials | None, insecure: bool) -> None:
    if address.fingerprint:
        hint = "the fingerprint is that of --identity; it is for those who connect"
        raise UsageError("an address to listen at has no fingerprint", got=str(address), hint=hint)
    if address.tls and credentials is None:
        hint = "obfuscatune identity new gpu1; then --identity gpu1.key --allow lab.pub"
        raise UsageError("tls:// needs an identity, and whom to allow", where=str(address), hint=hint)
    if credentials is not None and not address.tls:
        raise UsageError("--identity and --allow are for tls://", got=str(address))
    address.check_exposure(insecure, "--insecure")


def _run(
    inside: sandbox.Sandbox | None, listener: socket.socket, arguments: list[str], credentials: Credentials | None
) -> int:
    command = [sys.executable, "-P"] if inside is None else inside.command()
    environment = dict(os.environ) if inside is None else inside.environment
    command += ["-m", "obfuscatune.worker", "--listener", str(listener.fileno()), *arguments]
    ended, alive = os.pipe()
    handed = [listener.fileno(), alive]
    reader, writer = os.pipe() if credentials is not None else (None, None)
    if reader is not None:
        command += ["--credentials", str(reader)]
        handed.append(reader)
    try:
        process = subprocess.Popen(  # noqa: S603 - bubblewrap by its full path, and our own interpreter
            command, env={**environment, **WAITING, **_ONE_THREAD}, pass_fds=handed, stdin=subprocess.DEVNULL
        )
    finally:
        os.close(alive)
        if reader is not None:
            os.close(reader)
    try:
        if writer is not None and credentials is not None:
            with open(writer, "wb") as pipe, contextlib.suppress(BrokenPipeError):
                pipe.write(credentials.to_bytes())
        return process.wait()
    finally:
        # Bubblewrap takes all with it that is inside. Without it the worker ends its sessions, and is given the time.
        process.send_signal(signal.SIGTERM if inside is None else signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_ENDING_SECONDS)
        process.kill()
        process.wait()
        # The pipe's other end is the worker's alone, and closes when all of it is gone.
        select.select([ended], [], [], _ENDING_SECONDS)
        os.close(ended)
