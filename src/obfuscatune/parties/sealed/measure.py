"""What sealing and opening cost on this machine: megabytes a second of one thread, and memory."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from obfuscatune.parties.identity import Identity
from obfuscatune.parties.sealed.archive import COPY_BYTES, SealedArchive, seal_files
from obfuscatune.parties.sealed.reader import SealedReader
from obfuscatune.protocol.memory import peak_memory_bytes


@dataclass(frozen=True)
class Measurement:
    """One pass over the file.

    Attributes:
        what: seal or open. megabytes_per_second: 10^6 bytes of payload, by the clock on the wall.
        cpu_megabytes_per_second: by the CPU time of this process, which a busy machine does not slow down.
        peak_growth_bytes: growth of the process's peak memory since before the first pass.
    """

    what: str
    megabytes_per_second: float
    cpu_megabytes_per_second: float
    peak_growth_bytes: int


def measure(directory: Path, size: int, repetitions: int) -> Iterator[Measurement]:
    """Seal a file of ``size`` random bytes on disk and read all of it again, ``repetitions`` times.

    Disk is what ``directory`` is on; nothing is synced, so with enough memory it is the page cache.
    """
    plain, path = directory / "plain", directory / "file.sealed"
    # One random megabyte again and again: neither cipher nor hash takes longer for other bytes.
    block = os.urandom(COPY_BYTES)
    with plain.open("wb") as file:
        for start in range(0, size, COPY_BYTES):
            file.write(block[: size - start])
    identity = Identity.generate("bench")
    base = peak_memory_bytes()
    for _ in range(repetitions):
        for what in ("seal", "open"):
            wall, cpu = time.perf_counter(), time.process_time()
            if what == "seal":
                seal_files(path, {"plain": plain}, kind="data", sender=identity, recipients=[identity.public])
            else:
                _read_all(path, identity)
            seconds = time.perf_counter() - wall, time.process_time() - cpu
            yield Measurement(what, size / seconds[0] / 1e6, size / seconds[1] / 1e6, peak_memory_bytes() - base)


def _read_all(path: Path, identity: Identity) -> None:
    buffer = memoryview(bytearray(COPY_BYTES))
    with SealedReader(path, identity) as reader, SealedArchive(reader).open("plain") as file:
        while file.readinto(buffer):
            pass
