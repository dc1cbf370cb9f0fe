"""One listening worker for all tests of this folder: sessions follow one another, as the tests do."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import obfuscatune


@contextmanager
def listening(directory: Path) -> Iterator[str]:
    """A worker in a process of its own, by its address."""
    address = f"unix://{directory}/w.sock"
    command = [sys.executable, "-m", "obfuscatune.worker", "--listen", address, "--threads", "1"]
    command += ["--memory_gb", "4"]  # of each the same, whatever else runs: several workers share blocks by it
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:  # noqa: S603
        try:
            assert "listening" in process.stdout.readline()
            yield address
            assert process.poll() is None, "the worker died in some test"
        finally:
            process.terminate()


@pytest.fixture(scope="session")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a worker."""
    with listening(tmp_path_factory.mktemp("worker")) as address:
        yield address


@pytest.fixture(scope="session")
def second_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of another one."""
    with listening(tmp_path_factory.mktemp("worker")) as address:
        yield address


@pytest.fixture(scope="session")
def protect(worker: str) -> Callable[..., Any]:
    """`obfuscatune.protect` with that worker. The keys are of the weights and this seed: the same in every run."""
    return partial(obfuscatune.protect, worker=worker, timeout=60.0, insecure_test_seed=12)
