"""The memory that a session may take: what it holds is counted, what cannot be counted meets a limit of the system.

Counted are weights, pushed and held factors, kept calls with their outputs, KV caches, shared tensors and the
optimizer's state, each storage once. Autograd saves more than that for a kept call, and products need room while they
are computed. For these the system has a limit on the whole process: RLIMIT_DATA, or a share of the GPU's memory.
"""

import os
import re
import resource
from collections.abc import Hashable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from obfuscatune.errors import ProtocolError

_ENTRY_BYTES = 4096  # what a thing held costs beside its tensors, so that empty ones are not for nothing
_ROOM_BYTES = 256 * 1024**2  # of a process beyond its budget: stacks of threads, buffers of kernels, Python itself
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_OUT_OF_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory|bad_alloc|cannot allocate", re.I)


class Ledger:
    """Bytes of what a session holds.

    Args:
        budget: bytes; None counts only.
    """

    def __init__(self, budget: int | None = None) -> None:
        self.budget = budget
        self.held = 0
        self._entries: dict[Hashable, dict[int, int]] = {}  # of each, the bytes of its storages by their address
        self._counts: dict[int, int] = {}  # how many entries have a storage

    def hold(self, key: Hashable, tensors: Iterable[Tensor]) -> None:
        """Count what is held under ``key``, instead of what was.

        Raises:
            ProtocolError: it would be beyond the budget; then what was under the key stays counted.
        """
        storages = [tensor.untyped_storage() for tensor in tensors]
        new = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}
        old, held = self._entries.get(key), self.held
        self._add(new)
        if old is not None:
            self._remove(old)
        if self.budget is not None and self.held > max(held, self.budget):
            needed = self.held - held
            self._remove(new)
            if old is not None:
                self._add(old)
            raise over_budget(needed, self.budget - held, self.budget)
        self._entries[key] = new

    def drop(self, key: Hashable) -> None:
        """Count it no more; what is not counted is no error."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._remove(entry)

    def _add(self, entry: dict[int, int]) -> None:
        self.held += _ENTRY_BYTES
        for pointer, size in entry.items():
            count = self._counts.get(pointer, 0)
            self._counts[pointer] = count + 1
            self.held += size if count == 0 else 0

    def _remove(self, entry: dict[int, int]) -> None:
        self.held -= _ENTRY_BYTES
        for pointer, size in entry.items():
            count = self._counts.pop(pointer)
            if count > 1:
                self._counts[pointer] = count - 1
            else:
                self.held -= size


def over_budget(needed: int, left: int, budget: int) -> ProtocolError:
    """Return what a request is refused with that would hold more than the session may."""
    return ProtocolError(
        "out of the session's memory budget",
        got=f"{needed} bytes more",
        expected=f"at most {max(0, left)} of the {budget} that this worker gives a session",
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch or Python says that there is no memory left."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or bool(_OUT_OF_MEMORY.search(str(error)))


def limit_process(budget: int, device: torch.device) -> None:
    """Let the system bound what this process may take from here on: the budget, and some room to work in.

    To be called when the process has its threads and the device's context, which are not of the session.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), device)
        return  # CUDA itself maps far more than it uses
    taken = _status_bytes("VmData")
    if taken is not None:
        limit = taken + budget + _ROOM_BYTES
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        if hard == resource.RLIM_INFINITY or limit < hard:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def budget_of_each(free: int, sessions: int) -> int:
    """Return equal shares of what a device has free, in bytes, with the room taken off that each process needs."""
    return max(_ROOM_BYTES, free // sessions - _ROOM_BYTES)


def free_bytes(device: torch.device) -> int:
    """Return how much memory the device has free for sessions, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = _meminfo_bytes()
    for name in _CGROUP_LIMITS:
        text = Path(name).read_text().strip() if os.access(name, os.R_OK) else ""
        if text.isdigit():
            free = min(free, int(text))
    return free


def _meminfo_bytes() -> int:
    path = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", path.read_text(), re.MULTILINE) if path.exists() else None
    if found is not None:
        return int(found[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _status_bytes(name: str) -> int | None:
    path = Path("/proc/self/status")
    found = re.search(rf"^{name}:\s+(\d+) kB$", path.read_text(), re.MULTILINE) if path.exists() else None
    return None if found is None else int(found[1]) * 1024
