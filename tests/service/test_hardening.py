"""A hardened process is closed to other processes of its own user; one that is not is open: the control."""

import ctypes
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from obfuscatune.errors import ObfuscatuneError
from obfuscatune.service import hardening

NOBODY = 65534
SECRET = b"canary of the hardened process"

# Prints where its secret is, and stays until its standard input is closed.
VICTIM = """
import ctypes, os, sys
from obfuscatune.service.hardening import harden, is_hardened  # first: an ordinary user may not reach root's Python
if os.geteuid() == 0:
    os.setgroups([]); os.setresgid({uid}, {uid}, {uid}); os.setresuid({uid}, {uid}, {uid})
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # dumpable, as a program that an ordinary user starts
if sys.argv[1] == "hardened":
    harden()
secret = ctypes.create_string_buffer(sys.stdin.buffer.readline().strip())
print(ctypes.addressof(secret), is_hardened(), flush=True)
sys.stdin.read()
"""

# Tries every way to the bytes at an address of another process; prints what each way gave.
THIEF = """
import ctypes, os, sys
if os.geteuid() == 0:
    os.setgroups([]); os.setresgid({uid}, {uid}, {uid}); os.setresuid({uid}, {uid}, {uid})
pid, address, size = map(int, sys.argv[1:])
libc = ctypes.CDLL(None, use_errno=True)
try:
    with open(f"/proc/{{pid}}/mem", "rb") as memory:
        memory.seek(address)
        print("mem", memory.read(size).hex())
except OSError as error:
    print("mem", error.strerror)
class Part(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]
buffer = ctypes.create_string_buffer(size)
ours, theirs = Part(ctypes.addressof(buffer), size), Part(address, size)
zero, one = ctypes.c_ulong(0), ctypes.c_ulong(1)
got = libc.process_vm_readv(pid, ctypes.byref(ours), one, ctypes.byref(theirs), one, zero)
print("readv", buffer.raw.hex() if got == size else os.strerror(ctypes.get_errno()))
PTRACE_SEIZE = 0x4206
got = libc.ptrace(PTRACE_SEIZE, pid, None, None)
print("ptrace", "attached" if got == 0 else os.strerror(ctypes.get_errno()))
"""


@contextmanager
def victim(state: str) -> Iterator[tuple[int, int, bool]]:
    """A process of an ordinary user with a secret: its number, the secret's address, whether it says it is hardened."""
    command = [sys.executable, "-c", VICTIM.format(uid=NOBODY), state]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:  # noqa: S603
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(SECRET + b"\n")
        process.stdin.flush()
        address, hardened = process.stdout.readline().split()
        yield process.pid, int(address), hardened == b"True"
        process.stdin.close()
        assert process.wait(60) == 0


def steal(pid: int, address: int) -> dict[str, str]:
    command = [sys.executable, "-c", THIEF.format(uid=NOBODY), str(pid), str(address), str(len(SECRET))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)  # noqa: S603
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


def test_a_process_of_the_same_user_cannot_read_it() -> None:
    with victim("hardened") as (pid, address, hardened):
        assert hardened
        stolen = steal(pid, address)
    assert set(stolen) == {"mem", "readv", "ptrace"}
    assert set(stolen.values()) <= {"Permission denied", "Operation not permitted"}, stolen


def test_without_hardening_it_can() -> None:
    """The control; Yama's ptrace_scope, where it is above 0, keeps out what is no parent, hardened or not."""
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    if scope.exists() and int(scope.read_text()) > 0:
        pytest.skip(f"kernel.yama.ptrace_scope is {scope.read_text().strip()}: no control on this machine")
    with victim("open") as (pid, address, hardened):
        assert not hardened
        assert steal(pid, address) == {"mem": SECRET.hex(), "readv": SECRET.hex(), "ptrace": "attached"}


def test_what_it_starts_gains_no_rights_and_dumps_no_core() -> None:
    script = (
        "import subprocess; from obfuscatune.service.hardening import harden; harden(); harden();"
        "subprocess.run(['cat', '/proc/self/status', '/proc/self/limits'], check=True)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)  # noqa: S603
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["NoNewPrivs:", "1"] in lines
    assert ["Max", "core", "file", "size", "0", "0", "bytes"] in lines


@pytest.mark.parametrize("fault", ["limit", "refused", "no effect", "platform"])
def test_what_does_not_work_is_an_error(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("not allowed")

    class Libc:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def prctl(self, option: int, *_: object) -> int:
            ctypes.set_errno(1)
            return -1 if fault == "refused" else 7

    # Nothing here may take hold of the process that runs the tests.
    monkeypatch.setattr(ctypes, "CDLL", Libc)
    monkeypatch.setattr(resource, "setrlimit", refuse if fault == "limit" else lambda *_: None)
    if fault == "platform":
        monkeypatch.setattr(sys, "platform", "darwin")
    expected = {"limit": "not allowed", "refused": os.strerror(1), "no effect": "no effect", "platform": "darwin"}
    with pytest.raises(ObfuscatuneError, match=expected[fault]):
        hardening.harden()
