"""``obfuscatune job``: the contract of two owners, from the draft to the results."""

# ruff: noqa: RUF009 - option() makes a field, which is what the rule wants there

import contextlib
import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from obfuscatune.cli.connecting import EnclaveOptions, PolicyOptions, attested_identity
from obfuscatune.cli.options import ConfigOptions, argument, option, takes
from obfuscatune.durable import write_new
from obfuscatune.errors import ConsentError, ObfuscatuneError, SealError, UsageError, printable
from obfuscatune.profiles import PROFILES
from obfuscatune.settings import TrainingSettings

if TYPE_CHECKING:
    from obfuscatune.parties.channel.client import AttestedChannel
    from obfuscatune.parties.job import SignedJob

HELP = "Jobs: what an enclave is to do with a model and with data, agreed to and signed by both owners."
_ROLES = "provider, owner; repeatable"
_ENDED = {"done": 0, "failed": 1, "refused": 1}


@dataclass(frozen=True, kw_only=True)
class NewOptions(TrainingSettings, PolicyOptions, ConfigOptions):
    """Options of ``obfuscatune job new``."""

    output: Path = argument("the job file, which must not exist", metavar="FILE")
    provider: Path = option("NAME.pub of the model's provider")
    owner: Path = option("NAME.pub of the data's owner")
    evidence: Path = option("evidence of the enclave that is to run it, judged by --policy")
    model: str = option("the sealed model: its file, or its digest")
    data: str = option("the sealed rows to fine-tune on: their file, or their digest")
    prompts: str | None = option("sealed prompts to complete after the training: their file, or their digest", None)
    profile: str = option(f"what the worker may see: one of {', '.join(PROFILES)}", "balanced")
    dtype: Literal["float32", "float64", "bfloat16"] = option("of the weights", "float32")
    max_new_tokens: int = option("longest completion of a prompt", 32, min=1)
    adapter_to: list[str] | None = option(f"who gets the trained adapter: {_ROLES}; default: nobody", None)
    generations_to: list[str] | None = option(f"who gets the completions: {_ROLES}; default: the owner", None)
    queries_by: list[str] | None = option(f"who may query the trained model: {_ROLES}; default: nobody", None)
    max_queries: int = option("how many prompts in all", 1000, min=0)
    days: float = option("until it expires", 7.0, min=0.001)
    switches: dict[str, Any] = field(default_factory=dict)


@takes(NewOptions)
def new(options: NewOptions) -> None:
    """Write a job for both owners to sign. Whoever writes it decides nothing: what is signed is what counts."""
    from obfuscatune.parties.identity import PublicIdentity
    from obfuscatune.parties.job import Job, SignedJob

    given = {name: value for name, value in options.switches.items() if value is not None}
    generations = options.generations_to or (["owner"] if options.prompts else [])
    now = int(time.time())
    job = Job(
        provider=PublicIdentity.load(options.provider).fingerprint,
        owner=PublicIdentity.load(options.owner).fingerprint,
        enclave=attested_identity(options.evidence, options.policy, options.allow_simulation).fingerprint,
        model=_digest(options.model),
        data=_digest(options.data),
        prompts=None if options.prompts is None else _digest(options.prompts),
        profile=options.profile,
        switches=given,
        dtype=options.dtype,
        training=options.changed(),
        max_new_tokens=options.max_new_tokens,
        adapter_to=_roles(options.adapter_to or []),
        generations_to=_roles(generations),
        queries_by=_roles(options.queries_by or []),
        max_queries=options.max_queries if options.queries_by else 0,
        created=now,
        expires=now + int(options.days * 86_400),
    )
    _write_new(options.output, SignedJob(job).to_bytes())
    print(f"{options.output}  {job.digest}")


@dataclass(frozen=True, kw_only=True)
class SignOptions:
    """Options of ``obfuscatune job sign``."""

    file: Path = argument("the job file, which gets your signature", metavar="FILE")
    identity: Path = option("your NAME.key")
    terms: Path | None = option("your terms; a job beyond them is not signed", None)


@takes(SignOptions)
def sign(options: SignOptions) -> None:
    """Show a job and sign it. Read what it prints: your signature is your consent to exactly that."""
    from obfuscatune.parties.identity import Identity
    from obfuscatune.parties.job import SignedJob
    from obfuscatune.parties.terms import Terms, load_terms

    identity, signed = Identity.load(options.identity), SignedJob.load(options.file)
    role = signed.job.role_of(identity.public.fingerprint)
    if options.terms is not None and role is not None:
        faults = Terms.from_dict(load_terms(options.terms)).faults(signed.job, role, time.time())
        if faults:
            raise ConsentError("your terms do not allow this job", got="; ".join(faults), where=str(options.terms))
    signed = signed.sign(identity)
    _show(signed)
    beside = options.file.with_name(f".{options.file.name}.new")
    try:
        beside.write_bytes(signed.to_bytes())
        beside.replace(options.file)
    except OSError as error:
        raise ObfuscatuneError("cannot write the job", got=error.strerror, where=str(options.file)) from None


@dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """Options of ``obfuscatune job show``."""

    file: Path = argument("a job file", metavar="FILE")


@takes(ShowOptions)
def show(options: ShowOptions) -> None:
    """Print a job, and who has signed it."""
    from obfuscatune.parties.job import SignedJob

    _show(SignedJob.load(options.file))


@dataclass(frozen=True, kw_only=True)
class SubmitOptions(EnclaveOptions):
    """Options of ``obfuscatune job submit``."""

    file: Path = argument("the job file, signed by both", metavar="FILE")
    attach: list[Path] | None = option("a sealed input of yours, to be sent with it; repeatable", None)


@takes(SubmitOptions)
def submit(options: SubmitOptions) -> None:
    """Give a job to the enclave, with your sealed inputs; it starts once both owners' inputs are there.

    A job that has failed goes on from its last checkpoint: after a worker's crash, submit it again.
    """
    from obfuscatune.parties.job import SignedJob
    from obfuscatune.parties.sealed.header import read_header

    signed = SignedJob.load(options.file)
    inputs = {read_header(path).digest: path for path in options.attach or ()}
    unknown = sorted(str(path) for digest, path in inputs.items() if digest not in signed.job.inputs.values())
    if unknown:
        raise UsageError("file is no input of this job", got=", ".join(unknown), hint="obfuscatune job show")
    with options.connect(signed.job.enclave) as channel:
        channel.request({"op": "submit"}, signed.to_bytes())
        for digest, path in inputs.items():
            _upload(channel, signed.job.digest, digest, path)
        status, _ = channel.request({"op": "status", "job": signed.job.digest})
    print(_line(status))
    if status["status"] == "refused":
        raise ConsentError("the enclave refuses the job", got=printable(status["reason"]))


@dataclass(frozen=True, kw_only=True)
class WatchOptions(EnclaveOptions):
    """Options of ``obfuscatune job watch``."""

    file: Path = argument("the job file", metavar="FILE")
    once: bool = option("print the status and return", False, flag="--once")
    interval: float = option("seconds between two looks", 1.0, min=0.05)


@takes(WatchOptions)
def watch(options: WatchOptions) -> None:
    """Show how far a job is, until it has ended: steps, no content. Exits with 1 if it failed or was refused."""
    from tqdm import tqdm

    from obfuscatune.parties.job import SignedJob

    signed = SignedJob.load(options.file)
    with (
        options.connect(signed.job.enclave) as channel,
        tqdm(unit="step", file=sys.stderr, disable=options.once, leave=False) as bar,
    ):
        while True:
            status, _ = channel.request({"op": "status", "job": signed.job.digest})
            bar.total, bar.n = int(status["steps"]) or None, int(status["step"])
            bar.set_description(printable(status["status"]))
            if options.once or status["status"] in _ENDED:
                break
            time.sleep(options.interval)
    print(_line(status))
    if status["status"] in _ENDED and _ENDED[status["status"]]:
        raise typer.Exit(_ENDED[status["status"]])


@dataclass(frozen=True, kw_only=True)
class FetchOptions(EnclaveOptions):
    """Options of ``obfuscatune job fetch``."""

    file: Path = argument("the job file", metavar="FILE")
    output_dir: Path = option("directory for your results: adapter/, output/ and the sealed files they came in")
    keep_sealed: bool = option("fetch the sealed files and do not open them", False, flag="--keep_sealed")


@takes(FetchOptions)
def fetch(options: FetchOptions) -> None:
    """Fetch and open the results that the job gives to you: adapter, generations, or both."""
    from obfuscatune.parties.identity import Identity
    from obfuscatune.parties.job import SignedJob
    from obfuscatune.parties.sealed.archive import SealedArchive
    from obfuscatune.parties.sealed.extract import extract
    from obfuscatune.parties.sealed.reader import SealedReader

    signed, identity = SignedJob.load(options.file), Identity.load(options.identity)
    with options.connect(signed.job.enclave) as channel:
        status, _ = channel.request({"op": "status", "job": signed.job.digest})
        if status["status"] != "done":
            raise UsageError("the job is not done", got=_line(status), hint="obfuscatune job watch")
        results = {kind: digest for kind, digest in status["results"].items() if kind in ("adapter", "output")}
        if not results:
            raise UsageError("the job gives you no results", hint="obfuscatune job show")
        for kind in results:
            _download(channel, signed.job.digest, kind, options.output_dir / f"{kind}.sealed")
        enclave = channel.enclave
    for kind, digest in results.items():
        path = options.output_dir / f"{kind}.sealed"
        if options.keep_sealed:
            print(path)
            continue
        with SealedReader(path, identity) as reader:
            if reader.digest != digest or reader.header.kind != kind or reader.sender != enclave:
                raise SealError("not the result that the enclave has sealed", where=str(path))
            extract(SealedArchive(reader), options.output_dir / kind, progress=sys.stderr.isatty())
        print(options.output_dir / kind)


def _upload(channel: "AttestedChannel", job: str, digest: str, path: Path) -> None:
    from obfuscatune.parties.channel.transfer import upload

    fields = {"job": job, "file": digest}
    size = path.stat().st_size
    reply, _ = channel.request({**fields, "op": "resume_upload", "size": size})
    offset = int(reply["offset"])
    with path.open("rb") as source, _bar(f"send {path.name}", size, offset) as bar:
        if offset < size:
            upload(channel, {**fields, "op": "upload"}, source, size, start=offset, progress=bar.update)


def _download(channel: "AttestedChannel", job: str, kind: str, path: Path) -> None:
    from obfuscatune.parties.channel.transfer import download

    if path.exists():
        raise UsageError("file is there already", where=str(path), hint="nothing is ever overwritten")
    beside = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with beside.open("wb") as target, _bar(f"fetch {path.name}", None, 0) as bar:
            fields = {"op": "download", "job": job, "kind": kind}
            download(channel, fields, target, max_bytes=1 << 40, progress=bar.update)
        beside.replace(path)
    except OSError as error:
        raise ObfuscatuneError("cannot write a result", got=error.strerror, where=str(path)) from None
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def _bar(what: str, total: int | None, done: int) -> Iterator[Any]:
    from tqdm import tqdm

    shown = sys.stderr.isatty()
    with tqdm(desc=what, total=total, initial=done, unit="B", unit_scale=True, disable=not shown, leave=False) as bar:
        yield bar


def _digest(text: str) -> str:
    """The digest of a sealed file that is here, or one that the other party has told."""
    from obfuscatune.parties.sealed.header import read_header

    return text if re.fullmatch(r"[0-9a-f]{64}", text) else read_header(Path(text)).digest


def _roles(values: list[str]) -> Any:
    from obfuscatune.parties.vocabulary import ROLES

    given = [name for value in values for name in value.replace(",", " ").split()]
    unknown = sorted(set(given) - set(ROLES))
    if unknown:
        raise UsageError("unknown role", got=", ".join(unknown), expected=" or ".join(ROLES))
    return tuple(role for role in ROLES if role in given)


def _show(signed: "SignedJob") -> None:
    fields = signed.job.to_dict()
    for name in ("created", "expires"):
        fields[name] = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(fields[name]))
    fields["profile"] = signed.job.profile_name
    for name, value in fields.items():
        if name not in ("format", "switches", "nonce"):
            shown = ", ".join(value) or "nobody" if isinstance(value, list) else value
            print(f"{name:15} {json.dumps(shown) if isinstance(shown, dict) else shown}")
    for public, _ in signed.signatures:
        print(f"signed by       {signed.job.role_of(public.fingerprint)} {public.name}  {public.fingerprint}")
    print(f"digest          {signed.job.digest}")
    if signed.missing():
        print(f"not signed yet by the {' and the '.join(signed.missing())}")


def _line(status: dict[str, Any]) -> str:
    parts = [f"job {str(status['job'])[:16]}", printable(status["status"])]
    parts += [f"step {status['step']} of {status['steps']}"] if status["steps"] else []
    parts += [f"waits for: {', '.join(map(printable, status['missing']))}"] if status["missing"] else []
    parts += [printable(status["reason"])] if status["reason"] else []
    step = status.get("resumes_from", 0)
    if type(step) is int and status["status"] in ("waiting", "queued") and step:
        parts.append(f"goes on from step {step}")
    if status["status"] == "failed":
        start = f"from step {step}" if step else "from its beginning"
        parts.append(f"\nhint: obfuscatune job submit, once more, goes on {start}")
    return "  ".join(parts)


def _write_new(path: Path, data: bytes) -> None:
    try:
        write_new(path, data, mode=0o644)
    except FileExistsError:
        raise UsageError("file is there already", where=str(path)) from None
    except OSError as error:
        raise ObfuscatuneError("cannot write the job", got=error.strerror, where=str(path)) from None


_CONNECT = "--enclave tls://HOST:7443 --identity clinic.key --policy clinic.toml"
COMMANDS = {
    "new": (
        new,
        "Examples:\n\nobfuscatune job new job.json --provider lab.pub --owner clinic.pub --evidence enclave.evidence "
        "--policy clinic.toml --model DIGEST --data data.sealed --adapter_to owner --learning_rate 1e-4",
    ),
    "sign": (sign, "Examples:\n\nobfuscatune job sign job.json --identity clinic.key --terms terms.toml"),
    "show": (show, "Examples:\n\nobfuscatune job show job.json"),
    "submit": (submit, f"Examples:\n\nobfuscatune job submit job.json --attach data.sealed {_CONNECT}"),
    "watch": (watch, f"Examples:\n\nobfuscatune job watch job.json {_CONNECT}"),
    "fetch": (fetch, f"Examples:\n\nobfuscatune job fetch job.json --output_dir results {_CONNECT}"),
}
