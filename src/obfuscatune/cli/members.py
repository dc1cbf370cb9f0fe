"""The verbs of ``obfuscatune party`` about who may connect to the enclave."""

# ruff: noqa: RUF009 - option() makes a field, which is what the rule wants there

import datetime
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from obfuscatune.cli.asking import ask
from obfuscatune.cli.connecting import EnclaveOptions
from obfuscatune.cli.options import argument, option, takes
from obfuscatune.cli.output import check_new_file, check_parent
from obfuscatune.errors import ConsentError, ObfuscatuneError, UsageError

if TYPE_CHECKING:
    from obfuscatune.parties.change import SignedChange
    from obfuscatune.parties.enclave import Enclave

YES = "sign without being asked"


@takes(EnclaveOptions)
def members(options: EnclaveOptions) -> None:
    """Show who may connect, and the signed changes that led to this; all of them are checked."""
    from obfuscatune.parties.change import Member
    from obfuscatune.parties.succession import read_succession

    known = options.client().members()
    print("open: until the first job the operator's directory says who is in" if known.is_open else "closed")
    for member in known.membership.members:
        print(f"{member.role:9}{member.identity.name}  {member.identity.fingerprint}")
    names = {member.identity.fingerprint: member.identity.name for member in known.membership.members}
    for signed in () if known.is_open else known.chain:
        change, subject = signed.change, signed.change.subject
        came = subject if isinstance(subject, tuple) else (subject,)  # who has left is told by name too
        names |= {each.identity.fingerprint: each.identity.name for each in came if isinstance(each, Member)}
        if isinstance(subject, bytes) and (heir := read_succession(subject).successor) is not None:
            names[heir.fingerprint] = heir.name
        by = ", ".join(names.get(name, name[:16]) for name in signed.signatures)
        what = f"{change.act} {names[subject]} ({subject[:16]})" if subject in names else str(change)
        print(f"{change.number:4}  {change.digest[:16]}  {what}{f'  signed by {by}' if by else ''}")


@dataclass(frozen=True, kw_only=True)
class AdmitOptions(EnclaveOptions):
    """Options of ``obfuscatune party admit``."""

    public: Path = argument("NAME.pub of who is to be admitted; compare its fingerprint over another channel")
    operator: bool = option("as the operator of the enclave", False, flag="--operator")
    output: Path | None = option("where the change goes for the others to sign; default: membership-N.change", None)


@takes(AdmitOptions)
def admit(options: AdmitOptions) -> None:
    """Sign the admission of a party to the enclave. It gives nobody a right to another party's model or data.

    More than half of the members must sign it (`party agree`), the operator among them if there is one.
    """
    from obfuscatune.parties.change import Member
    from obfuscatune.parties.identity import PublicIdentity

    check_new_file(options.output, "--output")
    enclave = options.client()
    newcomer = Member(PublicIdentity.load(options.public), "operator" if options.operator else "party")
    signed = enclave.propose_change("admit", newcomer)
    print(f"{signed.change}  {newcomer.identity.fingerprint}")
    _pass_on(enclave, signed, options.output or options.party / f"membership-{signed.change.number}.change", new=True)


@dataclass(frozen=True, kw_only=True)
class RemoveOptions(EnclaveOptions):
    """Options of ``obfuscatune party remove``."""

    member: str = argument("name or fingerprint; your own to leave, for which your signature is enough")
    yes: bool = option(YES, False, flag="--yes")
    output: Path | None = option("where the change goes for the others to sign; default: membership-N.change", None)


@takes(RemoveOptions)
def remove(options: RemoveOptions) -> None:
    """Sign the removal of a party. Its connections, queries and jobs end, and its sealed inputs are removed."""
    check_new_file(options.output, "--output")
    enclave = options.client()
    found = [
        member.identity.fingerprint
        for member in enclave.members().membership.members
        if options.member in (member.identity.name, member.identity.fingerprint)
    ]
    if len(found) != 1:
        hint = "obfuscatune party members; of two of one name, give the fingerprint"
        raise UsageError("member", got=options.member, expected="one of the members", hint=hint)
    _ask(f"remove {options.member} ({found[0][:16]})", options.yes)
    signed = enclave.propose_change("remove", found[0])
    _pass_on(enclave, signed, options.output or options.party / f"membership-{signed.change.number}.change", new=True)


@dataclass(frozen=True, kw_only=True)
class AgreeOptions(EnclaveOptions):
    """Options of ``obfuscatune party agree``."""

    file: Path = argument("a change that another member has signed, or OLD.succession, which is handed in")
    yes: bool = option(YES, False, flag="--yes")


@takes(AgreeOptions)
def agree(options: AgreeOptions) -> None:
    """Sign a membership change that somebody else has signed, and submit it once enough have signed."""
    from obfuscatune.parties.change import MAX_CHANGE_BYTES, SignedChange
    from obfuscatune.parties.files import read_small
    from obfuscatune.parties.succession import SUFFIX

    data, enclave = read_small(options.file, MAX_CHANGE_BYTES, "change of membership"), options.client()
    if options.file.suffix == SUFFIX:
        enclave.succeed(data)
        print("handed in")
        return
    signed = SignedChange.from_bytes(data, f"change {options.file}")
    _ask(str(signed.change), options.yes)
    _pass_on(enclave, enclave.agree(signed), options.file)


@dataclass(frozen=True, kw_only=True)
class UpgradeOptions(EnclaveOptions):
    """Options of ``obfuscatune party upgrade``."""

    new_policy: Path = argument("TOML policy that accepts the new code, and nothing else; files it names are beside it")
    file: Path = option("file of the statement; made if missing, otherwise signed too", Path("enclave.upgrade"))
    to: str | None = option(
        "address of the new enclave, which must be running; no other enclave may then take the state", None
    )
    days: float | None = option(
        "days until the statement expires, by default 30; one that exists is refused if it expires later",
        None,
        min=0.01,
        ceiling=3650,
    )
    yes: bool = option(YES, False, flag="--yes")


@takes(UpgradeOptions)
def upgrade(options: UpgradeOptions) -> None:
    """Sign to which new code the enclave may hand over its state. Every party that ever was a member must sign.

    Each party brings its own policy, and all must be equal: the measurement of the code that you have read.
    """
    from obfuscatune.parties.attestation.policy import Policy
    from obfuscatune.parties.files import read_small
    from obfuscatune.parties.upgrade import MAX_BYTES, Upgrade, signers

    check_parent(options.file, f"--file {options.file}")
    client, memberships, now = options.client(), [], time.time()
    to, untold = None, "the enclave of the statement does not answer at this address"
    if options.to is not None:
        new = replace(client, address=options.to, policy=Policy.load(options.new_policy), folder=None)
        to = new.verify().require().identity.fingerprint
    if options.file.exists():  # who has left cannot ask the enclave any more, and must sign too
        statement = Upgrade.from_bytes(read_small(options.file, MAX_BYTES, "upgrade"), f"upgrade {options.file}")
        mine = Upgrade.make(statement.enclave, options.new_policy)
        if (statement.policy, statement.files) != (mine.policy, mine.files):
            hint = "one of you has not read the code that the other has"
            raise ConsentError("the statement has another policy than yours", where=str(options.file), hint=hint)
        if to not in (None, statement.to):
            got = f"{statement.to or 'any of that code'}"[:16]
            raise ConsentError("the statement is to another enclave", got=got, expected=f"{to}"[:16])
        statement.check_term(now)
        if options.days is not None and statement.expires > now + options.days * 86_400:
            got, hint = _moment(statement.expires), "sign it without --days, or have it made anew"
            raise ConsentError("the statement expires later than you want", got=got, where="--days", hint=hint)
        try:
            found = client.members().membership
            memberships = [found] if found.enclave == statement.enclave else []
        except ObfuscatuneError as error:
            untold = error.what
    else:
        memberships = [client.members().membership]
        enclave, days = memberships[0].enclave, 30.0 if options.days is None else options.days
        statement = Upgrade.make(enclave, options.new_policy, days=days, to=to)
    # One signature too many, and the enclave refuses the statement.
    me, needed = client.identity.public, list(signers(memberships).values())
    if memberships and me not in needed:
        got, hint = f"{me.name} {me.fingerprint[:16]}", "an operator need not sign; a party signs as who it is now"
        raise ConsentError("an upgrade is signed by parties of the enclave alone", got=got, hint=hint)
    policy: Policy = statement.load_policy()
    for name, values in sorted(policy.measurements.items()):
        print(f"{name:12} {' or '.join(sorted(values))}")
    where = (
        "in whatever enclave of it a party brings (--to names one)" if statement.to is None else f"in {statement.to}"
    )
    print(f"{'created':12} {_moment(statement.created)}\n{'expires':12} {_moment(statement.expires)}")
    _ask(f"hand over what is sealed to the enclave {statement.enclave} to this code, {where}", options.yes)
    statement = statement.sign(client.identity)
    _write(options.file, statement.to_bytes())
    lacking = ", ".join(statement.lacking(memberships))
    print(f"signed   {options.file}{f', which needs signatures of {lacking}' if lacking else ''}")
    if not memberships:
        print(f"who else must sign is not known: {untold}", file=sys.stderr)
        print("if you never were a party of it, your signature makes the statement void", file=sys.stderr)


@dataclass(frozen=True, kw_only=True)
class HandOverOptions(EnclaveOptions):
    """Options of ``obfuscatune party hand-over``."""

    to: str = option("address of the new enclave, which was started with --take_over")
    file: Path = option("the statement that all have signed", Path("enclave.upgrade"))


@takes(HandOverOptions)
def hand_over(options: HandOverOptions) -> None:
    """Have the enclave hand its state over to a new one, as all parties have signed.

    Exits with 0 if done; with 1 if the old one has ended but the new one still lacks what it names: then run it again.
    """
    import typer

    from obfuscatune.parties.files import read_small
    from obfuscatune.parties.reached import NotTakenError
    from obfuscatune.parties.upgrade import MAX_BYTES, Upgrade

    statement = Upgrade.from_bytes(read_small(options.file, MAX_BYTES, "upgrade"), f"upgrade {options.file}")
    try:
        print("handed over" if options.client().hand_over(statement, options.to) else "handed over before")
    except NotTakenError as error:
        print(f"handed over, and not taken yet:\n{error}", file=sys.stderr)
        raise typer.Exit(1) from None


@dataclass(frozen=True, kw_only=True)
class ReleaseOptions(EnclaveOptions):
    """Options of ``obfuscatune party release``."""

    yes: bool = option("release without being asked", False, flag="--yes")


@takes(ReleaseOptions)
def release(options: ReleaseOptions) -> None:
    """Release your share of the state of a stopped enclave to the new enclave at the address.

    The state is read only once all have released. Make sure that the old one has stopped: nothing else checks this.
    """
    enclave = options.client()
    of, share = enclave.share()
    _ask(f"release your share of the state of the enclave {of}, which must have stopped", options.yes, "release")
    lacking = enclave.release(share)
    print(f"released; shares of {lacking} more are needed" if lacking else "released; the enclave goes on")


def _moment(seconds: int) -> str:
    return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M} UTC"


def _write(path: Path, data: bytes) -> None:
    from obfuscatune.durable import rename, write_private

    beside = path.with_name(f".{path.name}.new")
    try:
        write_private(beside, data + b"\n")
        rename(beside, path)
    except OSError as error:
        raise ObfuscatuneError("cannot write it", got=error.strerror, where=str(path)) from None


def _pass_on(enclave: "Enclave", signed: "SignedChange", path: Path, *, new: bool = False) -> None:
    """Hand a change in if enough have signed it, or else write it for the others; a ``new`` one replaces no file."""
    lacking = enclave.lacking(signed)
    if not lacking:
        enclave.change(signed)
        print(f"done     membership {signed.change.number}  {signed.change.digest}")
        return
    if new and os.path.lexists(path):  # another change, perhaps with signatures of others that nobody has elsewhere
        hint = f"obfuscatune party agree {path} if it is this change; or else --output of another name"
        raise UsageError("file is there already", where=str(path), hint=hint)
    _write(path, signed.to_bytes())
    print(f"needs    {lacking}")
    print(f"give     {path} to another member: obfuscatune party agree {path.name}")


def _ask(what: str, yes: bool, deed: Literal["sign", "release"] = "sign") -> None:
    print(what, flush=True)
    ask(f"{deed} this?", yes)


COMMANDS = {
    "members": (members, "Examples:\n\nobfuscatune party members"),
    "admit": (admit, "Examples:\n\nobfuscatune party admit second-clinic.pub"),
    "remove": (remove, "Examples:\n\nobfuscatune party remove clinic"),
    "upgrade": (upgrade, "Examples:\n\nobfuscatune party upgrade new-policy.toml"),
    "hand-over": (hand_over, "Examples:\n\nobfuscatune party hand-over --to tls://HOST:7444"),
    "release": (release, "Examples:\n\nobfuscatune party release --enclave tls://HOST:7444"),
    "agree": (agree, "Examples:\n\nobfuscatune party agree membership-1.change"),
}
