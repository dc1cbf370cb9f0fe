"""A directory in memory for what some library insists on reading from a file: plain content never meets the disk.

Only tmpfs and ramfs count, as /proc/self/mountinfo has it. The pages of a tmpfs can be swapped out: where swap is on, a
warning says so, and an enclave's machine has none (a file system mounted with ``noswap`` is as good).

What is there goes when the process ends, however it ends: a shell of two lines waits for that, in a session of its own,
at the other end of a pipe which only the kernel closes when the process is killed. Where the shell is killed too, or
there is none, the next start removes it.

Under Gramine there is no mountinfo, and /dev/shm would be memory that the host can read. There /tmp is a tmpfs inside
the enclave, because the manifest says so, and the manifest is measured: only /tmp is taken. That was written from
Gramine's documents and not run under it.
"""

import os
import re
import secrets
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from obfuscatune.errors import ObfuscatuneError, UsageError

PROC = Path("/proc")
GRAMINE = Path("/dev/attestation/user_report_data")
_IN_MEMORY = ("tmpfs", "ramfs")
_PREFIX = re.compile(r"[a-z][a-z0-9-]{0,30}")
SWAP = (
    "swap is on: the system may write what is in memory to the disk; turn it off where the content is real (swapoff -a)"
)


@contextmanager
def ram_directory(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """Yield a new directory of mode 0700 in memory, and remove it with all that is in it at the end.

    Where the process is killed, a guard removes it. What was left even so under the same prefix is removed first;
    process ids tell, so processes that cannot see each other's must not share ``parent``.

    Args:
        prefix: small letters, digits and '-'.
        parent: a directory in memory; /dev/shm if not given, /tmp under Gramine.

    Raises:
        UsageError: ``parent`` is not in memory, or cannot be used.
        ObfuscatuneError: something could not be removed at the end.
    """
    if not _PREFIX.fullmatch(prefix):
        raise UsageError("prefix of a directory", got=repr(prefix), expected="small letters, digits, '-', at most 31")
    gramine = GRAMINE.exists() and not (PROC / "self/mountinfo").exists()
    parent = (parent or Path("/tmp" if gramine else "/dev/shm")).absolute()  # noqa: S108 - what this module is about
    if gramine:
        _require(parent == Path("/tmp"), parent, "under Gramine only /tmp is memory of the enclave")  # noqa: S108
    else:
        _check_mount(parent)
    _remove_leftovers(parent, prefix)
    started = _start_time(os.getpid())
    path = parent / f"{prefix}.{os.getpid()}.{started}.{secrets.token_hex(8)}"
    try:
        path.mkdir(mode=0o700)
    except OSError as error:
        raise UsageError("cannot make a directory in memory", got=error.strerror, where=str(parent)) from None
    guard = None if gramine else _guard(path)  # its /tmp is memory of the enclave and ends with it
    try:
        yield path
    finally:
        try:
            shutil.rmtree(path)
        except OSError as error:
            fault = ObfuscatuneError("plain content is left in memory", got=error.strerror, where=str(path))
            raise fault from None
        finally:
            if guard is not None:
                guard.communicate()


def _guard(path: Path) -> subprocess.Popen[bytes] | None:
    """Start what removes ``path`` when its end of a pipe is closed: by us, or by the kernel when we are killed."""
    command = ("/bin/sh", "-c", 'trap "" INT TERM HUP; read -r _; rm -rf -- "$1"', "sh", str(path))
    try:
        return subprocess.Popen(  # noqa: S603 - a fixed command; the path is ours
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={"PATH": "/usr/bin:/bin"},
            start_new_session=True,
        )
    except OSError:
        return None


def _check_mount(path: Path) -> None:
    hint = "give a directory on a tmpfs, for instance /dev/shm"
    try:
        table = (PROC / "self/mountinfo").read_text("utf-8", "replace")
        number = path.stat().st_dev
    except OSError as error:
        raise UsageError("cannot tell whether a directory is in memory", got=error.strerror, where=str(path)) from None
    device, kind, options = f"{os.major(number)}:{os.minor(number)}", "", ""
    for line in table.splitlines():
        # id, parent, device, root, mount point, options, optional fields, "-", type, source, options of the type.
        # By its device, not by its path, which another mount may hide.
        before, _, after = line.partition(" - ")
        if before.split(" ")[2] == device:
            kind, _, options = after.split(" ")[:3]
    _require(kind in _IN_MEMORY, path, hint, kind)
    if kind == "tmpfs" and "noswap" not in options.split(",") and _swap_is_on():
        warnings.warn(SWAP, stacklevel=5)


def _swap_is_on() -> bool:
    try:
        return len((PROC / "swaps").read_text().splitlines()) > 1  # after one line of titles
    except OSError:
        return False


def _remove_leftovers(parent: Path, prefix: str) -> None:
    for path in parent.glob(f"{prefix}.*.*.*"):
        _, pid, started, _ = path.name.rsplit(".", 3)
        try:
            mine = path.lstat().st_uid == os.geteuid() and path.is_dir() and not path.is_symlink()
            if mine and pid.isdecimal() and _start_time(int(pid)) != started:
                shutil.rmtree(path)
        except FileNotFoundError:
            continue  # another process removed it
        except OSError as error:
            raise UsageError("cannot remove what is left over", got=error.strerror, where=str(path)) from None


def _start_time(pid: int) -> str:
    """Return when a process started, in ticks since the boot, which tells it from a later one of that number."""
    try:
        stat = (PROC / str(pid) / "stat").read_text("utf-8", "replace")
    except OSError:
        return "0"
    return stat.rpartition(")")[2].split()[19]  # field 22; the second is a name in brackets that may hold any sign


def _require(good: bool, path: Path, hint: str, kind: str | None = None) -> None:
    if not good:
        raise UsageError("directory is not in memory", got=kind, expected="tmpfs", where=str(path), hint=hint)
