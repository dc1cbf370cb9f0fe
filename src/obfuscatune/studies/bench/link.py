"""How a protected contender reaches its worker: spawned, or listening on loopback, in the clear or under TLS.

``socket`` is spawned too, but shares no memory with the enclave: the row beside ``spawn`` that tells what that saves.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args
from unittest.mock import patch

from obfuscatune.durable import write_new
from obfuscatune.errors import ObfuscatuneError, UsageError
from obfuscatune.protocol.arena import Arena
from obfuscatune.protocol.waiting import WAITING

LinkKind = Literal["spawn", "socket", "tcp", "tls"]
_READY = "worker listening on "


def split_link(text: str) -> tuple[str, LinkKind]:
    """Split ``PROFILE@LINK``; without a link the worker is spawned. Raises UsageError for an unknown one."""
    profile, separator, link = text.partition("@")
    if separator and link not in get_args(LinkKind):
        expected = ", ".join(get_args(LinkKind))
        raise UsageError("unknown link", got=link, expected=f"one of {expected}", where=f"--profile {text}")
    return profile, link if separator else "spawn"  # type: ignore[return-value]


@contextlib.contextmanager
def worker_at(link: LinkKind, *, device: str, threads: int | None) -> Iterator[dict[str, Any]]:
    """Yield the arguments of ``protect`` that name a worker reached by such a link.

    Raises:
        ObfuscatuneError: it did not start.
    """
    if link in ("spawn", "socket"):
        # As on a system that has none; no user needs an option for it.
        none = patch.object(Arena, "create", return_value=None) if link == "socket" else contextlib.nullcontext()
        with none:
            yield {"worker": "spawn", "device": device, "threads": threads}
        return
    with tempfile.TemporaryDirectory(prefix="obfuscatune-bench-") as name:  # made with mode 0700
        command = [sys.executable, "-m", "obfuscatune", "worker", "--listen", f"{link}://127.0.0.1:0"]
        command += ["--device", device, "--sandbox", "none"]
        command += [] if threads is None else ["--threads", str(threads)]
        options: dict[str, Any] = {}
        if link == "tls":
            more, options = _identities(Path(name))
            command += more
        environment = {**os.environ, **WAITING}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:  # noqa: S603
            try:
                line = process.stdout.readline() if process.stdout is not None else ""
                if not line.startswith(_READY):
                    raise ObfuscatuneError("a worker did not start", got=f"exit {process.wait()}", where=link)
                yield {"worker": line.removeprefix(_READY).split(" ")[0].strip(), **options}
            finally:
                process.terminate()


def _identities(directory: Path) -> tuple[list[str], dict[str, Any]]:
    """Make an identity for each side; return the worker's options and those of ``protect``."""
    from obfuscatune.parties.canonical import encode
    from obfuscatune.parties.identity import Identity

    worker, enclave = Identity.generate("bench-worker"), Identity.generate("bench-enclave")
    key, allowed = directory / "worker.key", directory / "enclave.pub"
    write_new(key, worker.to_bytes())
    write_new(allowed, encode(enclave.public.to_dict()))
    return ["--identity", str(key), "--allow", str(allowed)], {"identity": enclave}
