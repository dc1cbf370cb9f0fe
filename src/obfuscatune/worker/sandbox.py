"""The worker in bubblewrap: no network, no files but Python's, no other process, no right.

It protects the machine, and an enclave's process on it, from a worker that was taken over through a fault in how it
reads requests. It does not protect the owners from the worker: that is what the keys are for.

The socket is bound outside and inherited, see `outside`: a worker at a TCP address needs no network either.
"""

import glob
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import obfuscatune
from obfuscatune.errors import UsageError

Mode = Literal["auto", "bubblewrap", "none"]

_PROBE_SECONDS = 30.0
_LIBRARIES = ("torch", "numpy", "msgpack")
_SYSTEM = (
    *("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"),
    *("/etc/alternatives", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/localtime"),
    "/sys/devices/system",  # which cores and caches there are
)
# Nodes that do not exist yet cannot be made inside: nvidia-smi, or any program that uses CUDA, makes them.
_GPU_NODES = ("/dev/nvidia*", "/dev/kfd", "/dev/dri", "/dev/dxg")
_PACKAGE = Path(obfuscatune.__file__).parent
_ENVIRONMENT = {"PATH", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "TZ"}
_ENVIRONMENT_PREFIXES = ("OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_", "CUDA_", "NVIDIA_", "HIP_", "ROCR_", "PYTORCH_")


class Sandbox:
    """Bubblewrap around programs of this Python.

    Args:
        device: of the worker; only for ``cuda`` are there a GPU's device nodes.

    Raises:
        UsageError: bubblewrap is not installed, or cannot be used here.
    """

    def __init__(self, device: str = "cpu") -> None:
        path = shutil.which("bwrap")
        if path is None:
            raise UsageError("bubblewrap is not installed", hint="install bubblewrap, or give --sandbox none")
        self._prefix = [
            *(path, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"),
            *("--tmpfs", "/tmp", "--proc", "/proc", "--dev", "/dev", "--chdir", "/"),  # noqa: S108 - the sandbox's own
            *_mounts(device),
            *("--remount-ro", "/"),  # bubblewrap's own, under all that is mounted
        ]
        self.environment = _environment()
        try:
            done = subprocess.run(  # noqa: S603 - bubblewrap by its full path, and our own interpreter
                self.command("-c", "import obfuscatune.worker"),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_PROBE_SECONDS,
            )
            fault = "" if done.returncode == 0 else done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        except (OSError, subprocess.TimeoutExpired) as error:
            done, fault = None, type(error).__name__
        if done is None or done.returncode != 0:
            hint = "user namespaces may be switched off on this machine; or give --sandbox none"
            raise UsageError("bubblewrap does not work here", got=ascii(fault)[:200], hint=hint)

    def command(self, *arguments: str) -> list[str]:
        """Return the command that runs Python with ``arguments`` in the sandbox."""
        return [*self._prefix, sys.executable, "-P", *arguments]


def choose(mode: Mode, device: str) -> Sandbox | None:
    """Return the sandbox of a mode; None for ``none``, and for ``auto`` where there is none, saying so on stderr.

    Raises:
        UsageError: ``bubblewrap``, and it cannot be used.
    """
    if mode == "none":
        return None
    try:
        return Sandbox(device)
    except UsageError as error:
        if mode == "bubblewrap":
            raise
        got = f": {error.got}" if error.got else ""
        print(f"warning: the worker runs without a sandbox: {error.what}{got}", file=sys.stderr)
        return None


def _mounts(device: str) -> Iterator[str]:
    for name in _SYSTEM:
        yield from ("--ro-bind-try", name, name)
    for path in _python():
        yield from ("--ro-bind", path, path)
    if device.startswith("cuda"):
        yield from ("--ro-bind", "/sys", "/sys")
        for node in sorted(node for pattern in _GPU_NODES for node in glob.glob(pattern)):
            yield from ("--dev-bind", node, node)


def _python() -> list[str]:
    """Return the directories of the interpreter, its libraries and this package.

    Raises:
        UsageError: one of them holds the home directory, which must not be readable inside.
    """
    found = [sys.prefix, sys.base_prefix, os.path.realpath(sys.base_prefix), *_libraries(), str(_PACKAGE)]
    home = Path(os.path.expanduser("~")).resolve()  # Path.home() raises where a user has none
    for path in map(Path, found):
        if path.resolve() == Path("/") or home.is_relative_to(path.resolve()):
            raise UsageError("bubblewrap would show the home directory", got=str(path), hint="give --sandbox none")
    return list(dict.fromkeys(found))


def _libraries() -> list[str]:
    """Return the directories of libraries that are not the interpreter's, for instance the user's own."""
    specifications = (importlib.util.find_spec(name) for name in _LIBRARIES)
    found = (Path(spec.origin).parents[1] for spec in specifications if spec is not None and spec.origin)
    return [str(path) for path in dict.fromkeys(found) if not path.is_relative_to(sys.prefix)]


def _environment() -> dict[str, str]:
    """Return bubblewrap's own environment, which the worker gets; arguments could be read by every user here."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _ENVIRONMENT or name.startswith(_ENVIRONMENT_PREFIXES)
    }
    packages = os.pathsep.join([str(_PACKAGE.parent), *_libraries()])
    return {**kept, "HOME": "/tmp", "USER": "worker", "PYTHONPATH": packages}  # noqa: S108 - the sandbox's own
