"""``obfuscatune connect``: an enclave's model, verified, for every client of OpenAI's interface on this machine."""

# ruff: noqa: RUF009 - option() makes a field, which is what the rule wants there

import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from obfuscatune.cli.connecting import EnclaveOptions
from obfuscatune.cli.contract import load_job
from obfuscatune.cli.options import ConfigOptions, option, takes
from obfuscatune.cli.serve import announce, require_packages
from obfuscatune.errors import ConsentError, UsageError

EPILOG = (
    "Examples:\n\nobfuscatune connect --job ../provider/job.json\n\n"
    "obfuscatune connect --enclave tls://HOST:7443 --policy clinic.toml --identity clinic.key\n\n"
    "OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=TOKEN python client.py"
)


_NAME = re.compile(r"[A-Za-z0-9._:-]{1,64}")  # a part of the path of /v1/models


@dataclass(frozen=True, kw_only=True)
class ConnectOptions(EnclaveOptions, ConfigOptions):
    """Options of ``obfuscatune connect``."""

    job: Path | None = option("the job file whose trained model is queried; default: job.json in your folder", None)
    name: str = option("what clients call the model", "job")
    port: int = option("port on 127.0.0.1; 0 takes a free one", 8000, min=0, ceiling=65535)
    reply_seconds: float = option("seconds that a request may take, waiting included", 600.0, min=1e-3, ceiling=1e6)


@takes(ConnectOptions)
def command(options: ConnectOptions) -> None:
    """Verify an enclave, and serve the model of a finished job on 127.0.0.1. If it is refused, no port is opened."""
    require_packages()
    if not _NAME.fullmatch(options.name):
        expected = "letters, digits and . _ : -, up to 64"
        raise UsageError("name of the model", got=options.name, expected=expected, where="--name")
    from obfuscatune.serving.app import build_app
    from obfuscatune.serving.limits import ServerLimits
    from obfuscatune.serving.metrics import Metrics
    from obfuscatune.serving.relay import Enclave
    from obfuscatune.serving.relayed import offer
    from obfuscatune.serving.server import Server, listen

    job = load_job(options.job, options.party).job
    client = options.client()  # once: a key under a passphrase is asked for once
    role = job.role_of(client.identity.public.fingerprint)  # None: perhaps of a party that has a new identity by now
    if not job.queries_by or (role is not None and role not in job.queries_by):
        raise ConsentError(
            "the job gives this party no queries", got=role, expected=" or ".join(job.queries_by) or None
        )
    with client.connect(job.enclave) as channel:
        print(channel.verdict, flush=True)
    token, metrics = secrets.token_urlsafe(32), Metrics()
    limits = ServerLimits(max_new_tokens=job.max_new_tokens, seconds=options.reply_seconds)
    enclave = Enclave(lambda: client.connect(job.enclave), channel, job, options.name, options.reply_seconds)
    with listen("127.0.0.1", options.port) as listener:
        app = build_app(
            offer(enclave, limits, metrics), limits, metrics, tokens=[token], hosts=["127.0.0.1", "localhost"]
        )
        server = Server(app, limits, give_up=enclave.give_up)
        enclave.start(on_fault=server.leave)
        announce(f"http://127.0.0.1:{listener.getsockname()[1]}", enclave.names, token)
        try:
            server.run(sockets=[listener])
        finally:
            enclave.close()
    if enclave.fault is not None:
        raise enclave.fault
