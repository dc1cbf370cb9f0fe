"""``obfuscatune enclave``: the cloud operator's side of a job."""

# ruff: noqa: RUF009 - option() makes a field, which is what the rule wants there

import contextlib
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from obfuscatune.cli.options import INSECURE_HELP, WORKER_FORMS, ConfigOptions, option, takes

HELP = "Run an enclave that serves jobs of a model provider and a data owner."
_PLATFORM = "configfs (TDX, SEV-SNP), gramine (SGX), azure, nitro, tpm, or simulation:DIR, which protects nothing"


@dataclass(frozen=True, kw_only=True)
class ServeOptions(ConfigOptions):
    """Options of ``obfuscatune enclave serve``."""

    platform: str = option(_PLATFORM)
    gpu: str | None = option("nvidia: show a report of this machine's confidential GPU too; or simulation:DIR", None)
    state: Path = option("directory for the sealed state, the log and sealed files, on any disk")
    parties: Path = option("directory with the NAME.pub files of who may connect until the first job")
    operator: Path | None = option(
        "your NAME.pub; after the first job, nobody is admitted without your signature", None
    )
    take_over: Path | None = option("enclave.pub of another enclave, whose state this one takes over first", None)
    escrow: bool = option(
        "without a sealing key (TDX): keep the state on the disk; all parties together can release it",
        False,
        flag="--escrow",
    )
    new: bool = option(
        "start as a new enclave although an earlier one's state is lost; what was sealed to that stays closed",
        False,
        flag="--new",
    )
    listen: str = option("tls://HOST:PORT; port 0 for any", "tls://127.0.0.1:7443")
    worker: list[str] | None = option(
        f"{WORKER_FORMS}; repeatable; a job uses those that it names by fingerprint, or else all of them",
        None,
    )
    worker_identity: Path | None = option("NAME.key that a tls:// worker knows; default: the enclave's own", None)
    insecure: bool = option(INSECURE_HELP, False, flag="--insecure")
    timeout: float = option("seconds to wait for each reply of the worker", 600.0, min=1e-3, ceiling=1e6)
    max_connections: int = option(
        "most connections at once before authentication, and as many again from parties; each needs a thread",
        512,
        min=2,
    )
    max_store_gb: float = option("GB that uploads may take on the disk", 100.0, min=0.001)


@takes(ServeOptions)
def serve(options: ServeOptions) -> None:
    """Serve until stopped. After a crash or kill it continues from the sealed state and the last checkpoint."""
    from obfuscatune.parties.attestation.platform import open_platform
    from obfuscatune.service.hardening import harden

    if options.platform != "gramine":  # it has no prctl; the host cannot read or trace an SGX enclave
        harden()
    _allow_descriptors()
    _take_stderr()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s")
    for noisy in ("transformers", "accelerate", "torch"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # Libraries' own bars and warnings: of a model that is not the operator's. transformers sets its level when it is
    # imported, by the operator's variable; at "info" it prints the model's configuration.
    os.environ |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing that a sealed model names is looked up anywhere
    signal.signal(signal.SIGTERM, _stop)
    platform = open_platform(options.platform)
    if options.gpu is not None:
        from obfuscatune.parties.attestation.gpu_machine import GpuPlatform, open_gpu

        platform = GpuPlatform(platform, open_gpu(options.gpu))
    from obfuscatune.parties.identity import Identity, PublicIdentity
    from obfuscatune.service.serve import open_service

    with open_service(
        options.state,
        platform,
        listen=options.listen,
        parties=options.parties,
        operator=None if options.operator is None else PublicIdentity.load(options.operator),
        worker=options.worker or ["spawn"],
        timeout=options.timeout,
        worker_identity=None if options.worker_identity is None else Identity.load(options.worker_identity),
        insecure=options.insecure,
        max_connections=options.max_connections,
        max_store_bytes=int(options.max_store_gb * 1e9),
        escrow=options.escrow,
        take_over=None if options.take_over is None else PublicIdentity.load(options.take_over),
        new=options.new,
        waiting=_say_that_it_waits,
    ) as service:
        _leave_on_sigterm(service.leave)
        if platform.simulated:
            print("SIMULATION: this enclave is an ordinary process and protects nothing", file=sys.stderr)
        # One line on stdout once it listens: whoever starts it waits for that.
        print(f"enclave {service.identity.fingerprint} listens at {service.address}", flush=True)
        try:
            service.work()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _say_that_it_waits(address: str) -> None:
    print(f"waits for a hand-over at {address}", flush=True)


def _allow_descriptors() -> None:
    """Take as many descriptors as the system allows: connections cost up to three, and 1,024 are the usual limit."""
    with contextlib.suppress(OSError, ValueError):
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _take_stderr() -> None:
    """Keep the terminal for what Python says: what native code writes there goes nowhere.

    A panic in a tokenizer's Rust prints what it fell over, and both the tokenizer and the text belong to others.
    """
    sys.stderr.flush()
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def _stop(number: int, frame: FrameType | None) -> None:
    # Wherever it comes: the state is whole at every point, and a running job goes on from its last checkpoint.
    raise SystemExit(0)


def _leave_on_sigterm(leave: Callable[[], None]) -> None:
    """Let SIGTERM end the service: in good order, and in a time that whoever sends it can count on.

    Queries that were begun may have to wait for a step of a job before they are answered, and a step may take minutes.
    """
    from obfuscatune.service.serve import LEAVING_SECONDS

    def stop(number: int, frame: FrameType | None) -> None:
        # Again and again, for what is raised where nobody can pass it on, as in a destructor, is lost.
        signal.setitimer(signal.ITIMER_REAL, LEAVING_SECONDS, 1.0)
        leave()

    signal.signal(signal.SIGALRM, _stop)
    signal.signal(signal.SIGTERM, stop)


COMMANDS = {
    "serve": (
        serve,
        "Examples:\n\nobfuscatune enclave serve --platform configfs --state /state --parties parties "
        "--worker unix:///run/worker.sock\n\n"
        "obfuscatune enclave serve --platform simulation:platform --state state --parties parties",
    ),
}
