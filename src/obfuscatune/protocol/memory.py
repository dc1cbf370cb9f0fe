"""Memory of this process: how much it has held at most, which both sides report, and how it reuses what is freed."""

import ctypes
import re
import resource
from pathlib import Path


def peak_memory_bytes() -> int:
    """Return the largest resident set so far, in bytes.

    From the kernel's status page where there is one: ``getrusage`` gives a process that was forked from a large one the
    large one's peak.
    """
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text() if status.exists() else "", re.MULTILINE)
    kibibytes = int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes * 1024


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed, for the tensors of the next step; False where the C library is not glibc.

    glibc gives the top of its heap back to the system as soon as 128 KiB to 64 MiB of it are free, and gets it again,
    page by page and zeroed, for the next tensors (`tests/protocol/test_memory.py` counts the page faults).
    The process stays as large as it was at its peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)) and bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES))


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_TRIM_BYTES = 2**31 - 1  # an int
_MMAP_BYTES = 32 << 20  # the most that glibc takes on 64 bits; larger tensors come from the system each time
