"""``obfuscatune worker``: serve keyed products at an address."""

import logging
from dataclasses import dataclass
from typing import Literal

import typer

from obfuscatune.cli.options import option, takes

EPILOG = (
    "Examples:\n\nobfuscatune worker --listen unix:///run/obfuscatune.sock\n\n"
    "obfuscatune worker --listen tcp://0.0.0.0:7000 --device cuda"
)


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """Options of ``obfuscatune worker``."""

    listen: str = option("unix://PATH or tcp://HOST:PORT; port 0 lets the system choose")
    device: str = option("where keyed weights live: cpu, cuda, cuda:1", "cpu")
    threads: int | None = option("CPU threads; default: torch's", None, min=1)
    sandbox: Literal["auto", "bubblewrap", "none"] = option("no network, no files: auto is where it can be had", "auto")


@takes(WorkerOptions)
def command(options: WorkerOptions) -> None:
    """Serve one enclave after another, until Ctrl-C or SIGTERM.

    The worker gets no key, no token and no text. Its channel is neither encrypted nor authenticated yet: let it listen
    only where nobody else can connect.
    """
    from obfuscatune.worker.__main__ import run

    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    code = run(listen_on=options.listen, device=options.device, threads=options.threads, mode=options.sandbox)
    raise typer.Exit(code)
