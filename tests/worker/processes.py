"""A worker that listens, as a process of its own, and what of it is alive."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from obfuscatune.protocol.address import Address, connect
from obfuscatune.protocol.connection import Connection

PATIENCE = 60  # seconds; nothing here takes more than a few

# The inner process alone, with bounds that a test can wait for.
SHORT = """
import signal, socket, sys, torch
from obfuscatune.worker.acceptor import Acceptor, Bounds
from obfuscatune.worker.child import Service
signal.signal(signal.SIGTERM, signal.default_int_handler)
print("worker listening on", sys.argv[2], flush=True)
try:
    service = Service(torch.device("cpu"), 1, 2**28)
    Acceptor(socket.socket(fileno=int(sys.argv[1])), service, Bounds(**eval(sys.argv[3]))).serve()
except KeyboardInterrupt:
    pass
"""


@contextlib.contextmanager
def worker(*options: str | Path) -> Iterator[tuple["subprocess.Popen[str]", Address]]:
    """`obfuscatune worker` with these options, at an address that it chooses where they name none."""
    listen = [] if "--listen" in options else ["--listen", "tcp://127.0.0.1:0"]
    command = [sys.executable, "-m", "obfuscatune", "worker", *listen, "--threads", "1", "--sandbox", "none"]
    with started([*command, *map(str, options)]) as (process, line):
        yield process, Address.parse(line.split()[3])


@contextlib.contextmanager
def started(command: Sequence[str], **more: Any) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A process that says that it listens, and what it said; it leaves on SIGTERM."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen(  # noqa: S603
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **more
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("worker listening on "), process.communicate(timeout=PATIENCE)
            yield process, line
            process.terminate()
            process.wait(PATIENCE)
        finally:
            process.kill()


def opened(address: Address) -> Connection:
    """A plain connection to the worker."""
    connection = Connection(connect(address, PATIENCE), peer="worker")
    connection.settimeout(PATIENCE)
    return connection


def ask(connection: Connection, header: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """The fields of the reply to one request."""
    connection.send(header, tensors or {})
    return connection.receive()[0]


def children(pid: int) -> list[int]:
    """Processes that a process has started and that are not reaped, zombies among them."""
    tasks = Path(f"/proc/{pid}/task")
    return [int(c) for task in tasks.iterdir() for c in (task / "children").read_text().split()]


def resident(pid: int) -> int:
    """Bytes of a process in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
