"""Whether a model fits: a job must not be killed for a query, nor the enclave for a job that cannot fit.

What a model of n bytes (sealed weights, in the job's dtype) takes is taken to be n in the enclave, the most that any
profile leaves there, and n and a process of its own for each worker that the enclave starts. Workers elsewhere look
after their own memory, and refuse a session that does not fit.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from obfuscatune.errors import BusyError

PROCESS_BYTES = 512 << 20  # of a worker without a model: torch alone is about 300 MiB
_CGROUP = Path("/sys/fs/cgroup")
_MIB = 1 << 20


def require_memory(weights: int, workers: Sequence[str], *, remote: bool) -> None:
    """Check that a model of so many bytes fits beside the one that is trained.

    Args:
        weights: bytes of the model. workers: addresses of its workers. remote: whether the profile has any.

    Raises:
        BusyError: it does not fit.
    """
    spawned = sum(worker == "spawn" for worker in workers) if remote else 0
    needed = weights + spawned * (weights + PROCESS_BYTES)
    _require(needed, "a second model does not fit beside the job that runs", "ask again when the job is done")


def require_memory_of_job(inputs: int, *, remote: bool) -> None:
    """Check that a job may fit at all: its sealed inputs of so many bytes, unless workers may have the model.

    What a training takes beside them, nobody knows before. But inputs larger than the machine would have the kernel end
    the enclave, for all parties.

    Raises:
        BusyError: it cannot fit.
    """
    if not remote:
        _require(
            inputs, "the job's inputs do not fit into the enclave's memory", "a smaller model, or a machine with more"
        )


def _require(needed: int, what: str, hint: str) -> None:
    free = free_bytes()
    if free is not None and needed > free:
        raise BusyError(what, got=f"{free // _MIB} MiB free", expected=f"{needed // _MIB} MiB", hint=hint)


def free_bytes() -> int | None:
    """Return the memory that this process may still take, by the machine and by its control group; None: unknown."""
    found = [int(kib) * 1024 for kib in re.findall(r"^MemAvailable:\s+(\d+) kB$", _read(Path("/proc/meminfo")), re.M)]
    limit, used = _read(_CGROUP / "memory.max").strip(), _read(_CGROUP / "memory.current").strip()
    if limit.isdigit() and used.isdigit():
        found.append(max(0, int(limit) - int(used)))
    return min(found, default=None)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
