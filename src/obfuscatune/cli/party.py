"""``obfuscatune party``: a party's folder, which all verbs of a job find."""

# ruff: noqa: RUF009 - option() makes a field, which is what the rule wants there

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from obfuscatune.cli import members
from obfuscatune.cli.connecting import PartyOptions, open_party
from obfuscatune.cli.options import argument, option, takes
from obfuscatune.errors import UsageError

if TYPE_CHECKING:
    from obfuscatune.parties.sealed.fields import Kind

HELP = "A party's folder: who you are, whom you trust, which enclave you use. Make it once; all job commands use it."


@dataclass(frozen=True, kw_only=True)
class InitOptions:
    """Options of ``obfuscatune party init``."""

    name: str = argument("how the others know you, for instance clinic")
    role: Literal["provider", "owner"] = option("who you are: provider of the model, or owner of the data")
    enclave: str = option("address of the enclave, tls://HOST:PORT")
    folder: Path = option("where it is made", Path("."))
    partner: Path | None = option("NAME.pub of the other party", None)
    policy: Path | None = option("TOML file that says which enclaves you accept; default: a template to fill in", None)
    passphrase: bool = option("ask for a passphrase, under which NAME.key is kept", False, flag="--passphrase")
    simulation: Path | None = option("root certificate of a simulator, to accept it: it protects nothing", None)


@takes(InitOptions)
def init(options: InitOptions) -> None:
    """Make a folder with identity, party.toml, a policy, and terms that let no single worker learn anything.

    Read policy and terms before you use them.
    """
    from obfuscatune.parties.party import Party
    from obfuscatune.parties.passphrase import new_passphrase

    party = Party.init(
        options.name,
        role=options.role,
        enclave=options.enclave,
        folder=options.folder,
        partner=options.partner,
        policy=options.policy,
        simulation=options.simulation,
        passphrase=new_passphrase(f"{options.name}.key") if options.passphrase else None,
    )
    public = party.identity.public
    print(f"you      {public.name}  {public.fingerprint}")
    if party.partner_file is not None:
        _show_partner(party.partner.name, party.partner.fingerprint)
    print(f"read     {party.policy_file} and {party.terms_file}")
    if options.policy is None and options.simulation is None:
        print(f"fill in  {party.policy_file}: which hardware, and which measurements; it accepts nothing yet")
    print(f"give     {party.folder / f'{public.name}.pub'} to the operator and to your partner")


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(PartyOptions):
    """Options of ``obfuscatune party verify``."""

    partner: Path | None = option("NAME.pub of the other party, or NAME.succession of its identity, to be kept", None)


@takes(VerifyOptions)
def verify(options: VerifyOptions) -> None:
    """Judge fresh evidence of the enclave by your policy, rule by rule; 0: accepted, 1: refused. Shows the partner."""
    from obfuscatune.parties.identity import PublicIdentity
    from obfuscatune.parties.succession import SUFFIX

    party, given = open_party(options.party), options.partner
    if given is not None and given.suffix == SUFFIX:  # whether the enclave answers or not: a key may be in other hands
        party, given = party.with_partner(given), None
    verdict = party.verify()
    print(verdict)
    if verdict.accepted:
        enclave, named = verdict.require().identity, given or party.partner_file
        print(f"enclave  {enclave.fingerprint}")
        if named is not None and PublicIdentity.load(named) == enclave:
            hint = "party verify --partner NAME.pub, of the other party"
            raise UsageError("this is the enclave's identity, not a partner's", where=str(named), hint=hint)
    if given is not None:
        party = party.with_partner(given)
    if party.partner_file is not None:
        _show_partner(party.partner.name, party.partner.fingerprint)
    if not verdict.accepted:
        raise typer.Exit(1)


@dataclass(frozen=True, kw_only=True)
class SealOptions(PartyOptions):
    """Options of ``obfuscatune party seal``."""

    model: Path | None = option("directory of a transformers model with safetensors", None)
    data: Path | None = option("JSONL rows to fine-tune on", None)
    held_out: Path | None = option("JSONL rows of the data to evaluate on, before and after, and not to train on", None)
    prompts: Path | None = option("JSONL rows with a prompt each, to be completed after the training", None)


@takes(SealOptions)
def seal(options: SealOptions) -> None:
    """Seal what is yours to the enclave, if your policy accepts it now, with your terms; KIND.card is for the partner.

    Every row is checked first. In a model, pickles, code and links are refused.
    """
    from obfuscatune.parties.sealed.models import model_files
    from obfuscatune.training.loading import check_model

    party = open_party(options.party)
    kinds: tuple[Kind, ...] = ("model", "data", "prompts")
    for kind in kinds:
        if getattr(options, kind) is not None:  # all of them, before the first one is sealed
            party.place_of(kind)
    jobs: dict[Kind, dict[str, Path]] = {}
    if options.model is not None:
        jobs["model"] = model_files(options.model)
        check_model(options.model)
    if options.data is not None:
        jobs["data"] = {"data.jsonl": options.data}
        if options.held_out is not None:
            jobs["data"]["held_out.jsonl"] = options.held_out
    elif options.held_out is not None:
        raise UsageError("rows held out of no data", expected="--data FILE with --held_out FILE")
    if options.prompts is not None:
        jobs["prompts"] = {"prompts.jsonl": options.prompts}
    if not jobs:
        raise UsageError("nothing to seal", expected="--model DIR; or --data FILE, and --prompts FILE")
    if "data" in jobs or "prompts" in jobs:
        from obfuscatune.training.data import read_prompts, read_rows

        for path in jobs.get("data", {}).values():
            read_rows(path)
        for path in jobs.get("prompts", {}).values():
            read_prompts(path)
    for kind, files in jobs.items():
        path = party.seal(kind, dict(files))
        print(f"{path}  stays sealed wherever it goes")
        print(f"{path.with_suffix('.card')}  for your partner")


@dataclass(frozen=True, kw_only=True)
class TrustOptions(PartyOptions):
    """Options of ``obfuscatune party trust``."""

    worker: Path = argument("NAME.pub of a worker")
    operator: str = option("who operates it, as you and your partner call them")


@takes(TrustOptions)
def trust(options: TrustOptions) -> None:
    """Add a worker and its operator to your terms, for jobs that name workers; those of `shared` must not collude.

    What is sealed already keeps its terms.
    """
    added = open_party(options.party).trust(options.worker, options.operator)
    print(f"worker   {added.operator}  {added.fingerprint}")


@dataclass(frozen=True, kw_only=True)
class RotateOptions(PartyOptions):
    """Options of ``obfuscatune party rotate``."""

    name: str = argument("of the new identity, for instance clinic-2027")
    passphrase: bool = option("ask for a passphrase, under which NAME.key is kept", False, flag="--passphrase")


@takes(RotateOptions)
def rotate(options: RotateOptions) -> None:
    """Make a new identity, which the old one names as its successor. Files and jobs must be sealed and signed again.

    If the old key may be in other hands, revoke it instead (`identity revoke`), and make a new folder.
    """
    from obfuscatune.parties.passphrase import new_passphrase

    passphrase = new_passphrase(f"{options.name}.key") if options.passphrase else None
    before = open_party(options.party)
    party, statement = before.rotate(options.name, passphrase=passphrase)
    print(f"you      {party.name}  {party.identity.public.fingerprint}")
    print(f"give     {statement} to your partner (party verify --partner) and to the operator (parties/)")
    # The enclave does not know the new identity yet, which is the one that commands use now.
    print(f"or hand it in yourself: party agree {statement} --identity {before.identity_file}")


def _show_partner(name: str, fingerprint: str) -> None:
    print(f"partner  {name}  {fingerprint}")
    print("compare this fingerprint with your partner over another channel", file=sys.stderr)


COMMANDS = {
    "init": (
        init,
        "Examples:\n\nobfuscatune party init clinic --role owner --enclave tls://HOST:7443 --policy mine.toml "
        "--partner lab.pub",
    ),
    "verify": (verify, "Examples:\n\nobfuscatune party verify --partner lab.pub"),
    "trust": (trust, "Examples:\n\nobfuscatune party trust gpu1.pub --operator 'A cloud'"),
    "rotate": (rotate, "Examples:\n\nobfuscatune party rotate clinic-2027"),
    "seal": (
        seal,
        "Examples:\n\nobfuscatune party seal --model DIR\n\n"
        "obfuscatune party seal --data records.jsonl --held_out kept.jsonl --prompts questions.jsonl",
    ),
    **members.COMMANDS,
}
