"""A worker that writes down all that it gets and gives.

    python -m obfuscatune.studies.audit.recorder --listen ADDRESS

It is the worker of every session, with a tap on its socket, in a process of its own. It stands for the operator of the
accelerator: what is in the file is what he has. It serves one enclave after another, each for a line of its standard
input, which names the file.

The file: records of direction (1 byte, 0 to the worker, 1 from it), seconds since the start (float64), length (uint64),
little-endian, then so many bytes of the wire.
"""

import argparse
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

import torch

from obfuscatune.errors import ObfuscatuneError
from obfuscatune.protocol.address import Address, close_listener, listen
from obfuscatune.protocol.connection import Connection
from obfuscatune.protocol.waiting import WAITING
from obfuscatune.worker.server import serve_connection

RECORD = struct.Struct("<BdQ")
TO_WORKER, TO_ENCLAVE = 0, 1
_DIRECTIONS = {"in": TO_WORKER, "out": TO_ENCLAVE}
_READY, _DONE = "recording", "recorded"


def record_one(listener: socket.socket, out: Path) -> None:
    """Serve one enclave until it closes, and write what crosses to ``out``."""
    accepted, _ = listener.accept()
    start = time.monotonic()
    with out.open("wb") as file:

        def tap(direction: str, run: bytes) -> None:
            file.write(RECORD.pack(_DIRECTIONS[direction], time.monotonic() - start, len(run)))
            file.write(run)

        serve_connection(Connection(accepted, peer="enclave", tap=tap), torch.device("cpu"))


class RecordingWorker:
    """A process that records, until the ``with`` block ends; it starts while its owner goes on."""

    def __enter__(self) -> Self:
        """Start it."""
        self._directory = TemporaryDirectory(prefix="obfuscatune-audit-")
        self._address = f"unix://{self._directory.name}/worker"
        command = [sys.executable, "-m", "obfuscatune.studies.audit.recorder", "--listen", self._address]
        environment = {**os.environ, **WAITING, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        self._process = subprocess.Popen(  # noqa: S603 - our own module
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()
        self._directory.cleanup()

    @contextmanager
    def recording(self, out: Path) -> Iterator[str]:
        """Yield its address for one session, and wait until ``out`` is written to the end.

        Raises:
            ObfuscatuneError: it did not start, or has ended.
        """
        pipe = self._process.stdin
        with suppress(BrokenPipeError):  # told by what it does not answer
            print(out, file=pipe, flush=True)
        self._await(_READY)
        yield self._address
        self._await(_DONE)

    def _await(self, word: str) -> None:
        answers = self._process.stdout
        if answers is None or answers.readline().strip() != word:
            self._process.kill()
            raise ObfuscatuneError("the recording worker failed", got=f"exit {self._process.wait()}")


def read_records(path: Path) -> Iterator[tuple[int, float, bytes]]:
    """Yield direction, seconds and bytes of each run of a file."""
    with path.open("rb") as file:
        while head := file.read(RECORD.size):
            direction, seconds, length = RECORD.unpack(head)
            yield direction, seconds, file.read(length)


def main() -> None:
    """Parse the option, and serve a session for each line."""
    parser = argparse.ArgumentParser(prog="python -m obfuscatune.studies.audit.recorder", description=__doc__)
    parser.add_argument("--listen", required=True, metavar="ADDRESS", help="unix://PATH")
    address = Address.parse(parser.parse_args().listen)
    listener = listen(address)
    try:
        for line in sys.stdin:
            print(_READY, flush=True)
            record_one(listener, Path(line.rstrip("\n")))
            print(_DONE, flush=True)
    finally:
        close_listener(listener, address)


if __name__ == "__main__":
    main()
