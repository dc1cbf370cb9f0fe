"""Hardening of a process that holds secrets, on Linux, before it holds any.

What `harden` does, for this process and what it starts by fork:

- PR_SET_DUMPABLE 0: ``/proc/PID`` belongs to root, so another process of the same user can neither read its memory
  (``/proc/PID/mem``, ``process_vm_readv``) nor attach with ptrace; there is no core dump;
- RLIMIT_CORE 0: no core dump for the programs that it starts either, whose dumpable flag the kernel sets anew;
- PR_SET_NO_NEW_PRIVS: neither it nor they gain rights from a set-user-ID program.

What it does not do: it keeps out neither root, nor who has CAP_SYS_PTRACE, nor the kernel, nor the machine's host; for
that an enclave needs a TEE. It does not lock memory: have no swap. It also keeps out debuggers and profilers.
"""

import ctypes
import os
import resource
import sys

from obfuscatune.errors import ObfuscatuneError

# linux/prctl.h
_PR_GET_DUMPABLE = 3
_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38
_PR_GET_NO_NEW_PRIVS = 39


def harden() -> None:
    """Harden this process; may be called again, and there is no way back.

    To be called before other threads start: the kernel sets no_new_privs for the calling thread and its descendants.

    Raises:
        ObfuscatuneError: not Linux, or the kernel refuses or does not do one of the three. An error and no warning: who
            calls this relies on it.
    """
    if sys.platform != "linux":
        raise ObfuscatuneError("cannot harden the process", got=sys.platform, expected="linux")
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (OSError, ValueError) as error:
        raise _refused("RLIMIT_CORE 0", str(error)) from None
    for name, setting, value, asking in (
        ("PR_SET_NO_NEW_PRIVS 1", _PR_SET_NO_NEW_PRIVS, 1, _PR_GET_NO_NEW_PRIVS),
        ("PR_SET_DUMPABLE 0", _PR_SET_DUMPABLE, 0, _PR_GET_DUMPABLE),
    ):
        _prctl(name, setting, value)
        if _prctl(name, asking) != value:
            raise _refused(name, "no effect")


def is_hardened() -> bool:
    """Whether this process is as `harden` leaves it."""
    return (
        sys.platform == "linux"
        and resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)
        and _prctl("PR_GET_NO_NEW_PRIVS", _PR_GET_NO_NEW_PRIVS) == 1
        and _prctl("PR_GET_DUMPABLE", _PR_GET_DUMPABLE) == 0
    )


def _prctl(name: str, option: int, value: int = 0) -> int:
    # Unused arguments must be zero, as unsigned longs: ctypes would pass an int in half a register.
    zero = ctypes.c_ulong(0)
    result = int(ctypes.CDLL(None, use_errno=True).prctl(option, ctypes.c_ulong(value), zero, zero, zero))
    if result < 0:
        raise _refused(name, os.strerror(ctypes.get_errno()))
    return result


def _refused(name: str, got: str) -> ObfuscatuneError:
    return ObfuscatuneError("the kernel does not harden the process", got=got, where=name)
