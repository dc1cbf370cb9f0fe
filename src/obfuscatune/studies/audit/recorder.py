"""A worker that writes down all that it gets and gives.

    python -m obfuscatune.studies.audit.recorder --listen ADDRESS --out FILE

It is the worker of every session, with a tap on its socket, in a process of its own. It stands for the operator of the
accelerator: what is in the file is what he has. It serves one enclave, then ends.

The file: records of direction (1 byte, 0 to the worker, 1 from it), seconds since the start (float64), length (uint64),
little-endian, then so many bytes of the wire.
"""

import argparse
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from obfuscatune.errors import ObfuscatuneError
from obfuscatune.protocol.address import Address, close_listener, listen
from obfuscatune.protocol.connection import Connection
from obfuscatune.protocol.waiting import WAITING
from obfuscatune.worker.server import serve_connection

RECORD = struct.Struct("<BdQ")
TO_WORKER, TO_ENCLAVE = 0, 1
_DIRECTIONS = {"in": TO_WORKER, "out": TO_ENCLAVE}
_READY = "recording"


def record_one(address: Address, out: Path) -> None:
    """Serve one enclave at the address until it closes, and write what crosses to ``out``."""
    listener = listen(address)
    try:
        print(_READY, flush=True)
        accepted, _ = listener.accept()
        start = time.monotonic()
        with out.open("wb") as file:

            def tap(direction: str, run: bytes) -> None:
                file.write(RECORD.pack(_DIRECTIONS[direction], time.monotonic() - start, len(run)))
                file.write(run)

            serve_connection(Connection(accepted, peer="enclave", tap=tap), torch.device("cpu"))
    finally:
        close_listener(listener, address)


@contextmanager
def recording_worker(out: Path) -> Iterator[str]:
    """Start the process, yield its address, and wait until it has written ``out`` to the end.

    Raises:
        ObfuscatuneError: it did not start, or ended with an error.
    """
    with TemporaryDirectory(prefix="obfuscatune-audit-") as directory:
        address = f"unix://{directory}/worker"
        command = [sys.executable, "-m", "obfuscatune.studies.audit.recorder", "--listen", address, "--out", str(out)]
        environment = {**os.environ, **WAITING, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:  # noqa: S603 - our own module
            try:
                if process.stdout is None or process.stdout.readline().strip() != _READY:
                    raise ObfuscatuneError("the recording worker did not start", got=f"exit {process.wait()}")
                yield address
            except BaseException:
                process.kill()
                raise
            if process.wait():
                raise ObfuscatuneError("the recording worker failed", got=f"exit {process.returncode}")


def read_records(path: Path) -> Iterator[tuple[int, float, bytes]]:
    """Yield direction, seconds and bytes of each run of a file."""
    with path.open("rb") as file:
        while head := file.read(RECORD.size):
            direction, seconds, length = RECORD.unpack(head)
            yield direction, seconds, file.read(length)


def main() -> None:
    """Parse the options and serve."""
    parser = argparse.ArgumentParser(prog="python -m obfuscatune.studies.audit.recorder", description=__doc__)
    parser.add_argument("--listen", required=True, metavar="ADDRESS", help="unix://PATH")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE")
    options = parser.parse_args()
    record_one(Address.parse(options.listen), options.out)


if __name__ == "__main__":
    main()
