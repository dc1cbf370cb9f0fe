"""``obfuscatune worker``: serve keyed products at an address."""

# ruff: noqa: RUF009 - option() makes a field, which is what the rule wants there

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from obfuscatune.cli.options import INSECURE_HELP, option, takes
from obfuscatune.errors import UsageError

if TYPE_CHECKING:
    from obfuscatune.protocol.tls import Credentials

EPILOG = (
    "Examples:\n\nobfuscatune worker --listen unix:///run/obfuscatune.sock\n\n"
    "obfuscatune identity new gpu1\n\n"
    "obfuscatune worker --listen tls://0.0.0.0:7000 --identity gpu1.key --allow lab.pub --device cuda\n\n"
    "obfuscatune worker --listen unix://w.sock --max_sessions 4 --memory_gb 8"
)


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """Options of ``obfuscatune worker``."""

    listen: str = option("unix://PATH, tls://HOST:PORT or tcp://HOST:PORT; port 0 lets the system choose")
    identity: Path | None = option("NAME.key of this worker, for tls://", None)
    allow: list[Path] | None = option("NAME.pub of an enclave that may connect at tls://; repeatable", None)
    insecure: bool = option(INSECURE_HELP, False, flag="--insecure")
    device: str = option("where keyed weights live: cpu, cuda, cuda:1", "cpu")
    threads: int | None = option("CPU threads of each session; default: torch's", None, min=1)
    max_sessions: int = option("enclaves served at once, each by a process of its own; others wait", 1, min=1)
    memory_gb: float | None = option(
        "GB that each session may take; default: an equal share of the free memory", None, min=0.001
    )
    sandbox: Literal["auto", "bubblewrap", "none"] = option(
        "run sessions without network and files; auto: where bubblewrap is there", "auto"
    )


@takes(WorkerOptions)
def command(options: WorkerOptions) -> None:
    """Serve enclaves, until Ctrl-C or SIGTERM.

    The worker gets no keys of the enclave, no tokens and no text. At tls:// it lets in only those that --allow names.

    It prints the address to give to the enclaves, with its fingerprint.
    """
    from obfuscatune.worker.outside import arguments_of, run

    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    code = run(
        listen_on=options.listen,
        arguments=arguments_of(options.threads, options.max_sessions, options.memory_gb),
        device=options.device,
        mode=options.sandbox,
        credentials=_credentials(options),
        insecure=options.insecure,
    )
    raise typer.Exit(code)


def _credentials(options: WorkerOptions) -> "Credentials | None":
    if options.identity is None and not options.allow:
        return None
    from obfuscatune.parties.identity import Identity, PublicIdentity
    from obfuscatune.parties.link import credentials_of

    if options.identity is None or not options.allow:
        missing = "--identity" if options.identity is None else "--allow"
        hint = "obfuscatune identity new makes NAME.key, which stays, and NAME.pub, which the other side gets"
        raise UsageError("a tls:// worker has an identity, and knows who may connect", expected=missing, hint=hint)
    allowed = [PublicIdentity.load(path) for path in options.allow]
    return credentials_of(Identity.load(options.identity), "worker", allow=allowed)
