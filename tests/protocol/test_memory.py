"""Peak memory is this process's own, not that of the one it was started from; freed memory is kept where asked for."""

import os
import subprocess
import sys

import numpy as np
import pytest

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


STEPS = """
import resource, sys, torch
from obfuscatune.protocol.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for step in range(6):
    if step == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2 << 20) for _ in range(8)]
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize("how", ["keep", "give back"])
def test_a_step_is_computed_in_the_memory_of_the_one_before(how: str) -> None:
    """64 MiB a step are 16,384 pages, four times."""
    command = [sys.executable, "-c", STEPS, how]
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}
    child = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)  # noqa: S603
    faults = int(child.stdout)
    assert faults < 5_000 if how == "keep" else faults > 4 * 10_000
