"""``obfuscatune job``: the contract of two owners, from the draft (`contract`) to the results."""

# ruff: noqa: RUF009 - option() makes a field, which is what the rule wants there

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from obfuscatune.cli.connecting import EnclaveOptions, open_party
from obfuscatune.cli.contract import load_job, propose, review, sign
from obfuscatune.cli.options import argument, option, takes
from obfuscatune.cli.output import check_place
from obfuscatune.errors import UsageError, printable

if TYPE_CHECKING:
    from obfuscatune.parties.enclave import Enclave, Progress, Status
    from obfuscatune.parties.job import SignedJob

HELP = "Jobs: what an enclave is to do with a model and with data, agreed to and signed by both owners."
FAILED, LOST = 1, 3  # exit codes: the job came to nothing; nobody knows what became of it


@dataclass(frozen=True, kw_only=True)
class RunOptions(EnclaveOptions):
    """Options of ``obfuscatune job run``."""

    file: Path | None = argument("the job file, signed by both; default: job.json in your folder", None, metavar="FILE")
    output_dir: Path = option("directory for your results", Path("results"))
    detach: bool = option("hand it in and return", False, flag="--detach")
    patience: float = option("seconds without an answer until the connection counts as lost", 300.0, min=0, ceiling=1e6)


@takes(RunOptions)
def run(options: RunOptions) -> None:
    """Submit a job with your sealed inputs from the folder, watch it, and fetch your results. May be run again.

    Exits with 1 if the job failed, was refused or cancelled, and with 3 if the connection was lost for too long.
    """
    from obfuscatune.parties.enclave import check_free, results_of

    if not options.detach:
        check_place(options.output_dir, f"--output_dir {options.output_dir}")
    signed, party = load_job(options.file, options.party), open_party(options.party)
    enclave = options.client(party)
    status = None
    try:
        status = enclave.status(signed)
    except UsageError as error:
        if "no such job" not in str(error):
            raise
    if not options.detach and (status is None or status.status == "failed" or not status.has_ended):
        # Before the work, whose results would have no place.
        check_free(options.output_dir, results_of(signed.job, enclave.identity.public.fingerprint))
    if status is None or status.status in ("waiting", "failed"):
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
    interval: float = option("seconds between two looks", 1.0, min=0.05, ceiling=1e6)
    patience: float = option("seconds without an answer until the connection counts as lost", 300.0, min=0, ceiling=1e6)


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
    check_place(options.output_dir, f"--output_dir {options.output_dir}")
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
