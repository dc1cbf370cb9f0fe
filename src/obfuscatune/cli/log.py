"""``obfuscatune log``: a party's check of what the enclave says that it did."""

# ruff: noqa: RUF009 - option() makes a field, which is what the rule wants there

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from obfuscatune.cli.connecting import EnclaveOptions
from obfuscatune.cli.options import argument, option, takes
from obfuscatune.durable import write_new
from obfuscatune.errors import FormatError, ProtocolError, RollbackError, UsageError

if TYPE_CHECKING:
    from obfuscatune.parties.identity import PublicIdentity
    from obfuscatune.service.log import CheckedLog

HELP = "The enclave's audit log: what it did for whom, in a chain that shows any change."


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Options of ``obfuscatune log check``."""

    file: Path = argument("a copy that `log fetch` wrote")
    earlier: Path | None = option("an earlier copy, which must be the beginning of this one", None)
    enclave: Path | None = option("who must have signed: a .pub file, or evidence that `attest verify` accepted", None)


@takes(CheckOptions)
def check(options: CheckOptions) -> None:
    """Check a copy of the log and print it; exits with 1 where it is broken, cut, forked or not the enclave's."""
    import sys

    import typer

    from obfuscatune.parties.identity import read_small
    from obfuscatune.service import log

    enclave = None if options.enclave is None else _load_enclave(options.enclave)
    data = read_small(options.file, log.MAX_COPY_BYTES, "copy of the log")
    before = None if options.earlier is None else read_small(options.earlier, log.MAX_COPY_BYTES, "earlier copy")
    subject, earlier = options.earlier, None
    try:
        if before is not None:
            earlier, head = log.split_copy(before)
            log.check(earlier, head, enclave)
        subject = options.file
        checked = log.check(*log.split_copy(data), enclave, earlier)
    except (FormatError, RollbackError) as error:
        print(f"BROKEN: {subject}\n{error}", file=sys.stderr)
        raise typer.Exit(1) from None
    _show(checked, options.earlier)


@dataclass(frozen=True, kw_only=True)
class FetchOptions(EnclaveOptions):
    """Options of ``obfuscatune log fetch``."""

    file: Path = argument("where the copy goes; must not exist")
    earlier: Path | None = option("an earlier copy, which must be the beginning of this one", None)


@takes(FetchOptions)
def fetch(options: FetchOptions) -> None:
    """Fetch the whole log from an enclave, check it, print it, and keep it for later comparisons (--earlier)."""
    from obfuscatune.parties.identity import read_small
    from obfuscatune.service import log

    before = None
    if options.earlier is not None:
        before, _ = log.split_copy(read_small(options.earlier, log.MAX_COPY_BYTES, "earlier copy"))

    with options.connect() as channel:
        reply, page = channel.request({"op": "log", "start": 0})
        lines = page
        while page and len(lines) <= log.MAX_COPY_BYTES:
            reply, page = channel.request({"op": "log", "start": lines.count(b"\n")})
            lines += page
        head = reply.get("head")
        if not isinstance(head, dict):
            raise ProtocolError("enclave's log without a head")
        checked = log.check(lines, head, channel.enclave, before)
    try:
        write_new(options.file, log.join_copy(lines, head))
    except OSError as error:
        raise UsageError("cannot write the copy", got=error.strerror, where=str(options.file)) from None
    _show(checked, options.earlier)
    print(f"kept as {options.file}")


def _load_enclave(path: Path) -> "PublicIdentity":
    from obfuscatune.parties.attestation.claims import EnclaveClaims
    from obfuscatune.parties.attestation.evidence import FORMAT, MAX_EVIDENCE_BYTES, Evidence
    from obfuscatune.parties.canonical import decode
    from obfuscatune.parties.identity import PublicIdentity, read_small

    data = read_small(path, MAX_EVIDENCE_BYTES, "enclave's identity or evidence").rstrip(b"\n")
    fields = decode(data, f"identity or evidence {path}")
    if fields.get("format") == FORMAT:
        return EnclaveClaims.from_dict(Evidence.from_bytes(data).claims).identity
    return PublicIdentity.from_dict(fields, f"identity file {path}")


def _show(checked: "CheckedLog", earlier: Path | None) -> None:
    from datetime import UTC, datetime

    # Plain columns, so that a line stays a line in a narrow terminal and for grep.
    print(f"{'entry':>6}  {'time (UTC)':<19}  {'job':<12}  {'party':<12}  event and details")
    for entry in checked.entries:
        when = datetime.fromtimestamp(entry.time, UTC).strftime("%Y-%m-%d %H:%M:%S")
        details = "".join(f" {name}={value}" for name, value in sorted(entry.details.items()))
        job, party = (entry.job or "-")[:12], (entry.party or "-")[:12]
        print(f"{entry.seq:>6}  {when}  {job:<12}  {party:<12}  {entry.event}{details}")
    print(f"{len(checked.entries)} entries, the chain is whole")
    if checked.signer is None:
        print("whose log it is was not checked: give --enclave")
    else:
        print(f"signed by {checked.signer.name}  {checked.signer.fingerprint}")
    if earlier is None:
        print("that nothing was rolled back was not checked: give --earlier")
    else:
        print(f"goes on from {earlier}: {checked.new_entries} new")


COMMANDS = {
    "fetch": (
        fetch,
        "Examples:\n\nobfuscatune log fetch monday.log --earlier sunday.log",
    ),
    "check": (
        check,
        "Examples:\n\nobfuscatune log check monday.log --enclave enclave.json\n\n"
        "obfuscatune log check tuesday.log --earlier monday.log --enclave enclave.json",
    ),
}
