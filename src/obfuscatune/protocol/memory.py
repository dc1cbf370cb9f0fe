"""How much memory this process has held at most; both sides report it."""

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
