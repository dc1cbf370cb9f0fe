"""``obfuscatune serve``: a protected model for every client of OpenAI's interface."""

# ruff: noqa: RUF009 - option() makes a field, which is what the rule wants there

import importlib.util
import os
import re
import secrets
import stat
import sys
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from obfuscatune.cli.options import ConfigOptions, ModelOptions, ProtectionOptions, option, takes
from obfuscatune.errors import ObfuscatuneError, UsageError

EPILOG = (
    "Examples:\n\nobfuscatune serve --model_name_or_path DIR\n\n"
    "obfuscatune serve --model_name_or_path DIR --adapter clinic=adapter --adapter lab=other --port 8000\n\n"
    "curl -H 'Authorization: Bearer TOKEN' http://127.0.0.1:8000/v1/models\n\n"
    "OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=TOKEN python client.py\n\n"
    "obfuscatune serve --model_name_or_path DIR --host 0.0.0.0 --allowed_host llm.example.org "
    "--ssl_certfile cert.pem --ssl_keyfile key.pem --token_file tokens"
)
_SERVER: dict[str, Any] = {"rich_help_panel": "Server"}
_LIMITS: dict[str, Any] = {"rich_help_panel": "Limits"}
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # PEFT makes modules of them, so no dots
_TAKEN = ("weight", "bias")  # of PEFT's layers
LEAST_TOKEN = 20  # characters


@dataclass(frozen=True, kw_only=True)
class ServeOptions(ModelOptions, ProtectionOptions, ConfigOptions):
    """Options of ``obfuscatune serve``."""

    adapter: list[str] | None = option("NAME=DIR of a PEFT adapter, which clients ask for by NAME; repeatable", None)
    chat_template: Path | None = option("Jinja file to use instead of the tokenizer's own template", None)
    host: str = option("address to listen on", "127.0.0.1", **_SERVER)
    port: int = option("port to listen on; 0 takes a free one", 8000, min=0, ceiling=65535, **_SERVER)
    allowed_host: list[str] | None = option("further host name that clients may use; repeatable", None, **_SERVER)
    token_file: Path | None = option(
        "file of access tokens, one a line, mode 0600; default: a new one, printed once", None, **_SERVER
    )
    ssl_certfile: Path | None = option("PEM file of a certificate, for https", None, **_SERVER)
    ssl_keyfile: Path | None = option("PEM file of its key", None, **_SERVER)
    insecure_http: bool = option(
        "allow http:// beyond this machine, which anyone on the path can read", False, flag="--insecure_http", **_SERVER
    )
    max_batch: int = option("requests computed together", 8, min=1, **_LIMITS)
    max_queue: int = option("requests that wait; more are answered 429", 64, min=1, **_LIMITS)
    max_new_tokens: int = option("longest completion", 512, min=1, **_LIMITS)
    request_seconds: float = option(
        "seconds that a request may take, waiting included", 300.0, min=1e-3, ceiling=1e6, **_LIMITS
    )


@takes(ServeOptions)
def command(options: ServeOptions) -> None:
    """Serve a protected model: OpenAI's /v1/chat/completions, /v1/completions and /v1/models, and a page to chat."""
    require_packages()
    adapters = _adapters(options.adapter or ())
    template = None if options.chat_template is None else _read(options.chat_template, "--chat_template")
    hosts = _hosts(options)
    tokens = [secrets.token_urlsafe(32)] if options.token_file is None else _tokens(options.token_file)

    from obfuscatune.serving.app import build_app
    from obfuscatune.serving.batcher import Batcher
    from obfuscatune.serving.handlers import offer
    from obfuscatune.serving.limits import ServerLimits
    from obfuscatune.serving.metrics import Metrics
    from obfuscatune.serving.models import serve_model
    from obfuscatune.serving.server import Server, listen

    limits = ServerLimits(
        max_batch=options.max_batch,
        max_queue=options.max_queue,
        max_new_tokens=options.max_new_tokens,
        seconds=options.request_seconds,
        connections=max(ServerLimits.connections, 2 * (options.max_queue + options.max_batch)),
    )
    certificate, key = (None if path is None else str(path) for path in (options.ssl_certfile, options.ssl_keyfile))
    with (
        listen(options.host, options.port) as listener,
        serve_model(options.model_name_or_path, options.dtype, adapters, options.protection(), template) as served,
    ):
        metrics = Metrics()
        batcher = Batcher(served, limits, metrics)
        app = build_app(offer(served, batcher, limits, metrics), limits, metrics, tokens=tokens, hosts=hosts)
        server = Server(app, limits, certificate=certificate, key=key, give_up=batcher.stop)
        batcher.start(on_fault=server.leave)
        scheme = "http" if options.ssl_certfile is None else "https"
        host = f"[{options.host}]" if ":" in options.host else options.host
        url = f"{scheme}://{host}:{listener.getsockname()[1]}"
        announce(url, served.names, tokens[0] if options.token_file is None else None)
        try:
            server.run(sockets=[listener])
        finally:
            batcher.close()
        print(served.protected.report(), file=sys.stderr)
        if batcher.fault is not None:
            if isinstance(batcher.fault, ObfuscatuneError):
                raise batcher.fault
            raise ObfuscatuneError("the model could not be asked any more", got=type(batcher.fault).__name__)


def require_packages() -> None:
    """Raise UsageError where the packages of the extra are missing."""
    missing = [name for name in ("fastapi", "openai", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{', '.join(missing)} not installed", hint="pip install '.[serve]' in the source of obfuscatune"
        )


def announce(url: str, names: tuple[str, ...], token: str | None) -> None:
    """Print where the server is, and the token of access where it was made for this run."""
    print(f"serving {', '.join(names)} at {url}/v1", flush=True)
    if token is not None:
        print(f"token: {token}", flush=True)
        print(f"page: {url}/#token={token}", flush=True)


def _adapters(given: "list[str] | tuple[()]") -> dict[str, str]:
    found: dict[str, str] = {}
    for item in given:
        name, equals, path = item.partition("=")
        if not equals or not path or not _NAME.fullmatch(name) or name == "base" or name in found:
            expected = "NAME=DIR, each name once, of letters, digits, - and _, and not base"
            raise UsageError("name of an adapter", got=item, expected=expected, where="--adapter")
        if name in _TAKEN or name.startswith("lora_") or name in _of_modules():
            raise UsageError("name of an adapter that PyTorch uses itself", got=name, where="--adapter")
        found[name] = os.path.expanduser(path)
    return found


def _of_modules() -> list[str]:
    """Return the names that PEFT cannot give to a module of its own in a ``ModuleDict``."""
    from torch.nn import ModuleDict

    return dir(ModuleDict())


def _hosts(options: ServeOptions) -> list[str]:
    """Return the names by which clients may know the server; refuses plain HTTP beyond this machine."""
    if (options.ssl_certfile is None) != (options.ssl_keyfile is None):
        raise UsageError("https wants both", expected="--ssl_certfile and --ssl_keyfile")
    try:
        is_local = options.host == "localhost" or ip_address(options.host).is_loopback
    except ValueError:
        is_local = False
    if not is_local and options.ssl_certfile is None and not options.insecure_http:
        hint = "--ssl_certfile and --ssl_keyfile, or --insecure_http where the network is your own"
        raise UsageError("prompts would cross the network in the clear", where=f"--host {options.host}", hint=hint)
    for name in options.allowed_host or ():
        if ":" in name.rpartition("]")[2] or "/" in name:
            hint = "the name alone: any port of it is allowed"
            raise UsageError("name of a host", got=name, where="--allowed_host", hint=hint)
    host = f"[{options.host}]" if ":" in options.host else options.host
    return ["localhost", "127.0.0.1", "[::1]", host, *(options.allowed_host or ())]


def _tokens(path: Path) -> list[str]:
    """Return the tokens of a file, which only this user can read."""
    lines = _read(path, "--token_file").splitlines()
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UsageError("others can read the tokens", where=f"--token_file {path}", hint=f"chmod 600 {path}")
    tokens = [line.strip() for line in lines if line.strip()]
    if not tokens or any(len(token) < LEAST_TOKEN or not token.isascii() or " " in token for token in tokens):
        expected = f"a line for each, of at least {LEAST_TOKEN} ASCII characters without spaces"
        raise UsageError("tokens of access", expected=expected, where=f"--token_file {path}")
    return tokens


def _read(path: Path, where: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # editors of Windows write a mark at the start
    except OSError as error:
        raise UsageError("cannot read the file", got=error.strerror, where=f"{where} {path}") from None
    except UnicodeDecodeError:
        pass
    raise UsageError("the file is no UTF-8 text", where=f"{where} {path}")
