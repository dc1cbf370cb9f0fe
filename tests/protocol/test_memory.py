"""Peak memory is this process's own, not that of the one it was started from."""

import subprocess
import sys

import numpy as np

from obfuscatune.protocol.memory import peak_memory_bytes

MEBIBYTE = 2**20


def test_a_large_parent_does_not_count() -> None:
    block = np.ones(300 * MEBIBYTE, dtype=np.uint8)
    assert peak_memory_bytes() > block.nbytes
    command = [sys.executable, "-c", "from obfuscatune.protocol.memory import peak_memory_bytes as p; print(p())"]
    child = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    assert MEBIBYTE < int(child.stdout) < 200 * MEBIBYTE


def test_a_peak_stays() -> None:
    before = peak_memory_bytes()
    np.ones(before + 50 * MEBIBYTE, dtype=np.uint8)
    assert peak_memory_bytes() >= before + 40 * MEBIBYTE
