"""``obfuscatune job``: the contract of two owners, from the draft to the results."""

# ruff: noqa: RUF009 - option() makes a field, which is what the rule wants there

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from obfuscatune.cli.connecting import EnclaveOptions, PartyOptions, open_party
from obfuscatune.cli.options import ConfigOptions, argument, option, takes
from obfuscatune.durable import write_new
from obfuscatune.errors import FormatError, ObfuscatuneError, UsageError, printable
from obfuscatune.profiles import PROFILES
from obfuscatune.settings import TrainingSettings

if TYPE_CHECKING:
    from obfuscatune.parties.enclave import Enclave, Progress, Status
    from obfuscatune.parties.job import SignedJob

HELP = "Jobs: what an enclave is to do with a model and with data, agreed to and signed by both owners."
FAILED, LOST = 1, 3  # exit codes: the job came to nothing; nobody knows what became of it
_ROLES = "provider, owner; repeatable"
_FILE = Path("job.json")


@dataclass(frozen=True, kw_only=True)
class ProposeOptions(TrainingSettings, PartyOptions, ConfigOptions):
    """Options of ``obfuscatune job propose``."""

    partner_input: list[Path] = option("KIND.card of what the partner has sealed; repeatable")
    output: Path | None = option("the job file, which must not exist; default: job.json in your folder", None)
    profile: str = option(f"what the worker may see: one of {', '.join(PROFILES)}", "enclave")
    worker: list[str] | None = option(
        "FINGERPRINT=OPERATOR of a worker that takes part, repeatable; of shared default: those of your terms", None
    )
    dtype: Literal["float32", "float64", "bfloat16"] = option("of the weights", "float32")
    max_new_tokens: int = option("longest completion of a prompt", 32, min=1)
    adapter_to: list[str] | None = option(f"who gets the trained adapter: {_ROLES}; default: the owner", None)
    generations_to: list[str] | None = option(f"who gets the completions: {_ROLES}; default: the owner", None)
    queries_by: list[str] | None = option(f"who may query the trained model: {_ROLES}; default: nobody", None)
    max_queries: int = option("how many prompts in all", 10, min=0)
    days: float = option("until it expires", 7.0, min=0.001)
    switches: dict[str, Any] = field(default_factory=dict)


@takes(ProposeOptions)
def propose(options: ProposeOptions) -> None:
    """Write a job on what both have sealed. Writing it decides nothing: only what both sign counts."""
    party = open_party(options.party)
    signed = party.propose(
        partner_inputs=options.partner_input,
        settings=options,
        days=options.days,
        profile=options.profile,
        switches={name: value for name, value in options.switches.items() if value is not None},
        workers=tuple(map(_worker, options.worker or ())),
        dtype=options.dtype,
        max_new_tokens=options.max_new_tokens,
        adapter_to=_roles(options.adapter_to or ["owner"]),
        generations_to=_roles(options.generations_to or ["owner"]),
        queries_by=_roles(options.queries_by or []),
        max_queries=options.max_queries if options.queries_by else 0,
    )
    path = options.output or party.folder / _FILE
    _write(path, signed, new=True)
    _print_review(signed, party.folder, options.partner_input)
    print(f"\nwritten to {path}; sign it, and give it to your partner")


@dataclass(frozen=True, kw_only=True)
class FileOptions(PartyOptions):
    """Options of verbs on a job file."""

    file: Path | None = argument("a job file; default: job.json in your folder", None, metavar="FILE")


@dataclass(frozen=True, kw_only=True)
class ReviewOptions(FileOptions):
    """Options of ``obfuscatune job review``."""


@takes(ReviewOptions)
def review(options: ReviewOptions) -> None:
    """Print all that a signature covers, including defaults; what the profile hides from whom; how much work it is."""
    _print_review(load_job(options.file, options.party), options.party)


@dataclass(frozen=True, kw_only=True)
class SignOptions(FileOptions):
    """Options of ``obfuscatune job sign``."""

    yes: bool = option("sign without being asked", False, flag="--yes")


@takes(SignOptions)
def sign(options: SignOptions) -> None:
    """Show a job, ask, sign it into your folder. A job beyond your terms, or with another partner, is not signed."""
    party = open_party(options.party)
    source, target = options.file or party.folder / _FILE, party.folder / (options.file or _FILE).name
    loaded = load_job(source, party.folder)
    signed = party.sign(loaded)  # refuses before anything is asked
    there = load_job(target, party.folder) if target.exists() else None
    if there is not None:
        if there.job != loaded.job:
            hint = "nothing is overwritten: rename it"
            raise UsageError("another job is there already", where=str(target), hint=hint)
        pairs = {
            public.fingerprint: (public, signature) for public, signature in (*there.signatures, *signed.signatures)
        }
        signed = replace(signed, signatures=tuple(pairs[each] for each in sorted(pairs)))
    _print_review(loaded, party.folder, [source.with_name("model.card")])
    if not options.yes:
        print("\nSign exactly this? [y/N] ", end="", flush=True)
        answer = sys.stdin.readline().strip().lower()
        if answer not in ("y", "yes"):
            raise UsageError("not signed", got=answer[:10] or "no answer", hint="--yes signs without being asked")
    _write(target, signed)
    left = f"not signed yet by the {' and the '.join(signed.missing())}" if signed.missing() else "signed by both"
    print(f"\nsigned as {party.role}: {target}, {left}")


@dataclass(frozen=True, kw_only=True)
class RunOptions(EnclaveOptions):
    """Options of ``obfuscatune job run``."""

    file: Path | None = argument("the job file, signed by both; default: job.json in your folder", None, metavar="FILE")
    output_dir: Path = option("directory for your results", Path("results"))
    detach: bool = option("hand it in and return", False, flag="--detach")
    patience: float = option("seconds without an answer until the connection counts as lost", 300.0, min=0)


@takes(RunOptions)
def run(options: RunOptions) -> None:
    """Submit a job with your sealed inputs from the folder, watch it, and fetch your results. May be run again.

    Exits with 1 if the job failed, was refused or cancelled, and with 3 if the connection was lost for too long.
    """
    signed, party = load_job(options.file, options.party), open_party(options.party)
    enclave = options.client(party)
    try:
        status = enclave.status(signed)
        known = status.status not in ("waiting", "failed")
    except UsageError as error:
        if "no such job" not in str(error):
            raise
        known = False
    if not known:
        with _bars() as progress:
            status = enclave.submit(signed, party.inputs_of(signed), progress)
    if options.detach:
        print(status)
        return
    status = _watched(enclave, signed, options.patience)
    if status.status == "deleted":
        raise UsageError("the job was deleted", hint="make a new one, and let both sign it: obfuscatune job propose")
    if not status.results:
        print("the job gives you no results")
        return
    _fetch(enclave, signed, options.output_dir, keep_sealed=False)


@dataclass(frozen=True, kw_only=True)
class SubmitOptions(EnclaveOptions):
    """Options of ``obfuscatune job submit``."""

    file: Path | None = argument("the job file, signed by both", None, metavar="FILE")
    attach: list[Path] | None = option("a sealed input of yours, to be sent with it; repeatable", None)


@takes(SubmitOptions)
def submit(options: SubmitOptions) -> None:
    """Give a job to the enclave, with your sealed inputs; it starts once both owners' inputs are there."""
    with _bars() as progress:
        print(options.client().submit(load_job(options.file, options.party), options.attach or (), progress))


@dataclass(frozen=True, kw_only=True)
class WatchOptions(EnclaveOptions):
    """Options of ``obfuscatune job watch``."""

    file: Path | None = argument("the job file", None, metavar="FILE")
    once: bool = option("print the status and return", False, flag="--once")
    interval: float = option("seconds between two looks", 1.0, min=0.05)
    patience: float = option("seconds without an answer until the connection counts as lost", 300.0, min=0)


@takes(WatchOptions)
def watch(options: WatchOptions) -> None:
    """Show the progress of a job until it has ended: steps, no content. Reconnects if the connection is lost.

    It also says for how long the job has paused between steps for queries of other jobs, and the bound on this.

    Exits with 1 if the job failed, was refused or cancelled, and with 3 if the connection was lost for too long.
    """
    enclave, signed = options.client(), load_job(options.file, options.party)
    if options.once:
        _end(enclave.status(signed))
        return
    _watched(enclave, signed, options.patience, options.interval)


@dataclass(frozen=True, kw_only=True)
class FetchOptions(EnclaveOptions):
    """Options of ``obfuscatune job fetch``."""

    file: Path | None = argument("the job file", None, metavar="FILE")
    output_dir: Path = option("directory for your results, and the sealed files they came in", Path("results"))
    keep_sealed: bool = option("fetch the sealed files and do not open them", False, flag="--keep_sealed")


@takes(FetchOptions)
def fetch(options: FetchOptions) -> None:
    """Fetch and open the results that the job gives to you: adapter, generations, and the owner's report."""
    signed = load_job(options.file, options.party)
    _fetch(options.client(), signed, options.output_dir, keep_sealed=options.keep_sealed)


@dataclass(frozen=True, kw_only=True)
class EndOptions(EnclaveOptions):
    """Options of ``obfuscatune job cancel`` and ``job delete``."""

    file: Path | None = argument("the job file", None, metavar="FILE")


@takes(EndOptions)
def cancel(options: EndOptions) -> None:
    """End an unfinished job for good: at once if it waits, at its next step if it runs."""
    print(options.client().cancel(load_job(options.file, options.party)))


@takes(EndOptions)
def delete(options: EndOptions) -> None:
    """Delete an ended job from the enclave: results, inputs, the trained model. Fetch what is yours first."""
    print(options.client().delete(load_job(options.file, options.party)))


@dataclass(frozen=True, kw_only=True)
class ListOptions(EnclaveOptions):
    """Options of ``obfuscatune job list``."""


@takes(ListOptions)
def list_(options: ListOptions) -> None:
    """List your jobs in the enclave, oldest first."""
    for status in options.client().jobs():
        print(status)


def load_job(path: Path | None, folder: Path) -> "SignedJob":
    """Return the job of a file, or without one of a party's folder; raises UsageError, also as `SignedJob.load`."""
    from obfuscatune.parties.job import SignedJob

    if path is None and not (folder / _FILE).exists():
        hint = "obfuscatune job propose makes one; or name the file that your partner has signed"
        raise UsageError("no job file in your folder", where=str(folder / _FILE), hint=hint)
    return SignedJob.load(folder / _FILE if path is None else path)


def _write(path: Path, signed: "SignedJob", *, new: bool = False) -> None:
    try:
        if new:
            write_new(path, signed.to_bytes(), mode=0o644)
            return
        beside = path.with_name(f".{path.name}.new")
        beside.write_bytes(signed.to_bytes())
        beside.replace(path)
    except FileExistsError:
        raise UsageError("file is there already", where=str(path), hint="--output of another name") from None
    except OSError as error:
        raise ObfuscatuneError("cannot write the job", got=error.strerror, where=str(path)) from None


def _print_review(signed: "SignedJob", folder: Path, cards: "list[Path] | None" = None) -> None:
    from obfuscatune.parties.sealed.card import read_card
    from obfuscatune.parties.summary import review
    from obfuscatune.parties.terms import Terms

    size, terms = None, {}
    for kind, digest in signed.job.inputs.items():
        for path in (*(cards or ()), folder / f"{kind}.sealed", folder / f"{kind}.card"):
            with contextlib.suppress(UsageError, FormatError):  # no card here, or old terms: this says less
                card = read_card(path)
                if card.digest == digest:
                    size = card.header.payload_bytes if kind == "model" else size
                    terms[f"the {kind}"] = Terms.from_dict(card.header.terms)
    for line in review(signed, model_bytes=size, terms=terms):
        print(line)


def _watched(enclave: "Enclave", signed: "SignedJob", patience: float, interval: float = 1.0) -> "Status":
    """Watch a job to its end; exits as `watch` says."""
    from tqdm import tqdm

    from obfuscatune.parties.enclave import LostError
    from obfuscatune.parties.vocabulary import TURNS

    status, said = None, ""
    role = signed.job.role_of(enclave.identity.public.fingerprint)
    print(TURNS, file=sys.stderr)
    try:
        with tqdm(unit="step", file=sys.stderr, leave=False, disable=not sys.stderr.isatty()) as bar:
            for status in enclave.watch(signed, interval=interval, patience=patience):
                now = _standing(status, role)
                if now != said and not status.has_ended:
                    tqdm.write(now, file=sys.stderr)
                bar.total, bar.n, said = status.steps or None, status.step, now
                bar.set_description(printable(status.status))
    except LostError as error:
        print(f"LOST: {error}", file=sys.stderr)
        raise typer.Exit(LOST) from None
    if status is None:
        raise UsageError("nothing is known of the job", where=enclave.address)
    _end(status)
    return status


def _standing(status: "Status", role: str | None) -> str:
    """Return where a job stands, in a line; of one that waits, who is to hand in what."""
    from obfuscatune.parties.party import KINDS

    line = "  ".join(printable(text) for text in (status.status, status.reason) if text)
    for side, kinds in KINDS.items():
        missing = [kind for kind in kinds if kind in status.missing]
        if missing and status.status == "waiting":
            whose = "you to hand in" if side == role else f"the {side} to hand in"
            line += f"\nit waits for {whose} {' and '.join(missing)}: obfuscatune job run"
    return line


def _end(status: "Status") -> None:
    print(status)
    for part in status.workers:
        who = f"{printable(part.get('operator'))}  {printable(part.get('worker'))[:16]}" if part.get("worker") else "a"
        had = f"{printable(part.get('form'))}, {printable(part.get('blocks'))} blocks"
        print(f"  worker {who}: {had}, {printable(part.get('parameters'))} parameters")
    if status.has_ended and status.status not in ("done", "deleted"):
        raise typer.Exit(FAILED)


def _fetch(enclave: "Enclave", signed: "SignedJob", directory: Path, *, keep_sealed: bool) -> None:
    import json

    with _bars() as progress:
        found = enclave.fetch(signed, directory, keep_sealed=keep_sealed, progress=progress)
    for path in found:
        print(path)
    path = directory / "report" / "report.json"
    if path in [each / "report.json" for each in found]:
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["loss"]:
            first, last = report["loss"][0], report["loss"][-1]
            print(f"loss {first['loss']:.4g} at step {first['step']}, {last['loss']:.4g} at step {last['step']}")
        if (held := report["held_out"]) is not None:
            print(f"on rows held out: loss {held['loss_before']:.4g} before, {held['loss_after']:.4g} after")


@contextlib.contextmanager
def _bars() -> "Iterator[Progress]":
    """A bar for each file that moves, where a person looks."""
    from tqdm import tqdm

    bars: dict[str, Any] = {}

    def progress(name: str, done: int, total: int) -> None:
        if name not in bars:
            shown = sys.stderr.isatty()
            bars[name] = tqdm(desc=name, unit="B", unit_scale=True, disable=not shown, leave=False)
        bars[name].total = total or None
        bars[name].update(done - bars[name].n)

    try:
        yield progress
    finally:
        for bar in bars.values():
            bar.close()


def _worker(text: str) -> Any:
    from obfuscatune.parties.vocabulary import Worker

    fingerprint, _, operator = text.partition("=")
    try:
        return Worker.from_dict({"fingerprint": fingerprint, "operator": operator})
    except FormatError as error:
        raise UsageError(error.what, got=repr(text), expected="--worker FINGERPRINT=OPERATOR") from None


def _roles(values: list[str]) -> Any:
    from obfuscatune.parties.vocabulary import ROLES

    given = [name for value in values for name in value.replace(",", " ").split()]
    unknown = sorted(set(given) - {*ROLES, "nobody"})
    if unknown:
        raise UsageError("unknown role", got=", ".join(unknown), expected=f"{' or '.join(ROLES)}, or nobody")
    return tuple(role for role in ROLES if role in given)


COMMANDS = {
    "propose": (
        propose,
        "Examples:\n\nobfuscatune job propose --partner_input model.card --max_steps 500 --learning_rate 1e-4\n\n"
        "obfuscatune job propose --partner_input model.card --profile shared",
    ),
    "review": (review, "Examples:\n\nobfuscatune job review job.json"),
    "sign": (sign, "Examples:\n\nobfuscatune job sign\n\nobfuscatune job sign from-clinic/job.json"),
    "run": (run, "Examples:\n\nobfuscatune job run\n\nobfuscatune job run --detach"),
    "list": (list_, "Examples:\n\nobfuscatune job list"),
    "submit": (submit, "Examples:\n\nobfuscatune job submit job.json --attach data.sealed"),
    "watch": (watch, "Examples:\n\nobfuscatune job watch"),
    "fetch": (fetch, "Examples:\n\nobfuscatune job fetch --output_dir results"),
    "cancel": (cancel, "Examples:\n\nobfuscatune job cancel job.json"),
    "delete": (delete, "Examples:\n\nobfuscatune job delete job.json"),
}
