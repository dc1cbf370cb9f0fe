"""Where results come from: code, machine, versions, command; printed with every table."""

import datetime
import hashlib
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from obfuscatune import __version__

_CHUNK = 1 << 20


def describe(command: Sequence[str] | None = None, *, seeds: Sequence[int] = (), device: str = "cpu") -> dict[str, Any]:
    """Return commit, whether the package differs from it, seeds, device, CPU, cores, versions, date (UTC), command.

    Args:
        command: the arguments after ``obfuscatune``; those of this process by default.
        device: of the worker; an accelerator's own name is under ``accelerator``.
    """
    arguments = sys.argv[1:] if command is None else command
    return {
        **describe_commit(),
        "seeds": list(seeds),
        "device": device,
        **describe_machine(["obfuscatune", *arguments]),
    }


def describe_machine(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Return CPU model, cores, versions, date (UTC) and the command line ``argv``, without the program's path."""
    argv = sys.argv if argv is None else argv
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers", "peft")},
        "obfuscatune": __version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(argv[0]).name, *argv[1:]]),
    }


def describe_commit() -> dict[str, Any]:
    """Return ``{"commit", "dirty"}`` of the checkout that this package is a tracked part of; None for both elsewhere.

    ``dirty`` says whether a file of the package differs from the commit; results that lie beside it do not count.
    """
    package = Path(__file__).parents[2]
    # An installation below some other project's checkout is not of that project's commit.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return {"commit": None, "dirty": None}
    return {"commit": _git(package, "rev-parse", "HEAD"), "dirty": bool(_git(package, "status", "--porcelain", "."))}


def digest_files(paths: Iterable[Path]) -> str:
    """Return one SHA-256 over the names and contents of files, in the order of their names: 64 hex digits."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        inner = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                inner.update(chunk)
        digest.update(f"{inner.hexdigest()}  {path.name}\n".encode())
    return digest.hexdigest()


def _git(directory: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)  # noqa: S603 - our own arguments
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or "unknown"
