"""The job file of ``obfuscatune job``: what both owners propose, review and sign, without the enclave."""

# ruff: noqa: RUF009 - option() makes a field, which is what the rule wants there

import contextlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from obfuscatune.cli.asking import ask
from obfuscatune.cli.connecting import PartyOptions, open_party
from obfuscatune.cli.options import ConfigOptions, argument, option, takes
from obfuscatune.cli.output import check_new_file
from obfuscatune.durable import rename, sync, write_new
from obfuscatune.errors import FormatError, ObfuscatuneError, UsageError
from obfuscatune.profiles import PROFILES
from obfuscatune.settings import TrainingSettings

if TYPE_CHECKING:
    from obfuscatune.parties.job import SignedJob

_ROLES = "provider, owner; repeatable"
_FILE = Path("job.json")
_QUERIES = 10


@dataclass(frozen=True, kw_only=True)
class ProposeOptions(TrainingSettings, PartyOptions, ConfigOptions):
    """Options of ``obfuscatune job propose``."""

    partner_input: list[Path] = option("KIND.card of what the partner has sealed; repeatable")
    output: Path | None = option("the job file, which must not exist; default: job.json in your folder", None)
    profile: str = option(f"what the worker may see: one of {', '.join(PROFILES)}", "enclave")
    worker: list[str] | None = option(
        "FINGERPRINT=OPERATOR of a worker that takes part, repeatable; default under shared: those of your terms", None
    )
    dtype: Literal["float32", "float64", "bfloat16"] = option("of the weights", "float32")
    max_new_tokens: int = option("longest completion of a prompt", 32, min=1)
    adapter_to: list[str] | None = option(f"who gets the trained adapter: {_ROLES}; default: the owner", None)
    generations_to: list[str] | None = option(f"who gets the completions: {_ROLES}; default: the owner", None)
    queries_by: list[str] | None = option(f"who may query the trained model: {_ROLES}; default: nobody", None)
    max_queries: int | None = option(f"how many prompts in all, with --queries_by; default: {_QUERIES}", None, min=0)
    days: float = option("days until the job expires", 7.0, min=0.001, ceiling=3650)
    switches: dict[str, Any] = field(default_factory=dict)


@takes(ProposeOptions)
def propose(options: ProposeOptions) -> None:
    """Write a job on what both have sealed. Writing it decides nothing: only what both sign counts."""
    check_new_file(options.output, "--output")
    party = open_party(options.party)
    path, queries_by = options.output or party.folder / _FILE, _roles(options.queries_by or [])
    check_new_file(path, "--output")  # the default too
    if options.max_queries and not queries_by:
        got, hint = f"--max_queries {options.max_queries}", "nobody may ask a query of a job without --queries_by"
        raise UsageError("queries by nobody", got=got, expected="--queries_by provider, or owner", hint=hint)
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
        queries_by=queries_by,
        max_queries=(_QUERIES if options.max_queries is None else options.max_queries) if queries_by else 0,
    )
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
    print(flush=True)
    ask("sign exactly this?", options.yes)
    _write(target, signed)
    left = f"not signed yet by the {' and the '.join(signed.missing())}" if signed.missing() else "signed by both"
    print(f"\nsigned as {party.role}: {target}, {left}")


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
        try:
            beside.write_bytes(signed.to_bytes())
            sync(beside)
            rename(beside, path)
        finally:
            beside.unlink(missing_ok=True)
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
