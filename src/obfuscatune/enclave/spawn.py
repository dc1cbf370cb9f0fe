"""Getting a worker: a process of our own on a socket pair, or one that already listens at an address."""

import os
import socket
import subprocess
import sys

from obfuscatune.enclave.session import Session
from obfuscatune.errors import UsageError
from obfuscatune.protocol.address import Address, connect
from obfuscatune.protocol.connection import Connection
from obfuscatune.protocol.limits import Limits
from obfuscatune.protocol.waiting import WAITING


def open_session(worker: str, *, timeout: float, threads: int | None, device: str | None) -> Session:
    """Return a session with a new worker (``"spawn"``) or with the one at an address; no request is sent yet.

    Raises:
        UsageError: bad address, no worker there, or options that only a spawned worker can take.
    """
    if worker == "spawn":
        return _spawn(timeout=timeout, threads=threads, device=device or "cpu")
    if threads is not None or device is not None:
        raise UsageError(
            "threads and device of a worker at an address are set where it is started",
            where=worker,
            hint="obfuscatune worker --listen ADDRESS --device DEVICE --threads N",
        )
    address = Address.parse(worker)
    connection = Connection(connect(address, timeout=timeout), limits=Limits(), peer=str(address))
    return Session(connection, worker=str(address), timeout=timeout)


def _spawn(*, timeout: float, threads: int | None, device: str) -> Session:
    """Start a worker on one end of a socket pair: no file, no port, and it ends when the other end closes."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    command = [sys.executable, "-m", "obfuscatune.worker", "--fd", str(theirs.fileno()), "--device", device]
    if threads is not None:
        command += ["--threads", str(threads)]
    environment = {**os.environ, **WAITING}
    try:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment
        )
    except OSError:
        ours.close()
        raise
    finally:
        theirs.close()
    name = f"spawned process {process.pid}"
    connection = Connection(ours, limits=Limits(), peer=name)
    return Session(connection, worker=name, timeout=timeout, process=process)
