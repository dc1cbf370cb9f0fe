"""``obfuscatune log``: a party's check of what the enclave says that it did."""

# ruff: noqa: RUF009 - option() makes a field, which is what the rule wants there

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from obfuscatune.cli.connecting import EnclaveOptions
from obfuscatune.cli.options import argument, option, takes
from obfuscatune.cli.output import check_new_file
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
    enclave: Path | None = option(
        "who must have signed: the .pub file of an enclave, or evidence that you have verified", None
    )


@takes(CheckOptions)
def check(options: CheckOptions) -> None:
    """Check a copy of the log and print it; exits with 1 where it is broken, cut, forked or not the enclave's."""
    import contextlib
    import sys

    import typer

    from obfuscatune.service import log

    enclave = None if options.enclave is None else _load_enclave(options.enclave)
    subject = options.earlier or options.file
    try:
        if options.earlier is not None:
            with log.open_copy(options.earlier) as (head, lines):
                # Whole, whoever has signed it: after a hand-over that was another enclave. That it is the beginning
                # of what this enclave signs is checked below.
                log.check_lines(lines, head, None)
        subject = options.file
        with contextlib.ExitStack() as stack:
            head, lines = stack.enter_context(log.open_copy(options.file))
            earlier = None if options.earlier is None else stack.enter_context(log.open_copy(options.earlier))[1]
            checked = log.check_lines(lines, head, enclave, earlier)
    except (FormatError, RollbackError) as error:
        print(f"BROKEN: {subject}\n{error}", file=sys.stderr)
        raise typer.Exit(1) from None
    _show(options.file, checked, options.earlier)


@dataclass(frozen=True, kw_only=True)
class FetchOptions(EnclaveOptions):
    """Options of ``obfuscatune log fetch``."""

    file: Path = argument("where the copy goes; must not exist")
    earlier: Path | None = option("an earlier copy, which must be the beginning of this one", None)


@takes(FetchOptions)
def fetch(options: FetchOptions) -> None:
    """Fetch the whole log from an enclave, check it, print it, and keep it for later comparisons (--earlier)."""
    from obfuscatune.service import log
    from obfuscatune.service.entries import MAX_LINE_BYTES

    check_new_file(options.file, "FILE")
    # Page by page to the disk, checked line by line: the log may be longer than this machine's memory.
    pages_path, copy_path = (options.file.with_name(f".{options.file.name}.{end}") for end in ("pages", "new"))
    try:
        with options.connect() as channel, pages_path.open("w+b") as pages:
            reply, page = channel.request({"op": "log", "start": 0})
            start = 0
            while page:
                if not page.endswith(b"\n"):
                    raise ProtocolError("enclave's log with half an entry")
                pages.write(page)
                start += page.count(b"\n")
                reply, page = channel.request({"op": "log", "start": start})
            head = reply.get("head")
            if not isinstance(head, dict):
                raise ProtocolError("enclave's log without a head")
            pages.seek(0)
            with contextlib.ExitStack() as stack:
                before = None if options.earlier is None else stack.enter_context(log.open_copy(options.earlier))[1]
                read = iter(lambda: pages.readline(MAX_LINE_BYTES + 1), b"")
                checked = log.check_lines(read, head, channel.enclave, before)
            pages.seek(0)
            with copy_path.open("wb") as copy:
                copy.write(log.join_copy(b"", head))
                shutil.copyfileobj(pages, copy)
                copy.flush()
                os.fsync(copy.fileno())
        os.link(copy_path, options.file)  # never over what is there
    except OSError as error:
        raise UsageError("cannot write the copy", got=error.strerror, where=str(options.file)) from None
    finally:
        pages_path.unlink(missing_ok=True)
        copy_path.unlink(missing_ok=True)
    _show(options.file, checked, options.earlier)
    print(f"kept as {options.file}")


def _load_enclave(path: Path) -> "PublicIdentity":
    from obfuscatune.parties.attestation.claims import EnclaveClaims
    from obfuscatune.parties.attestation.evidence import FORMAT, MAX_EVIDENCE_BYTES, Evidence
    from obfuscatune.parties.canonical import decode
    from obfuscatune.parties.files import read_small
    from obfuscatune.parties.identity import PublicIdentity

    data = read_small(path, MAX_EVIDENCE_BYTES, "enclave's identity or evidence").rstrip(b"\n")
    fields = decode(data, f"identity or evidence {path}")
    if fields.get("format") == FORMAT:
        return EnclaveClaims.from_dict(Evidence.from_bytes(data).claims).identity
    return PublicIdentity.from_dict(fields, f"identity file {path}")


def _show(path: Path, checked: "CheckedLog", earlier: Path | None) -> None:
    from datetime import UTC, datetime

    from obfuscatune.service import log
    from obfuscatune.service.entries import Chain

    # Plain columns, so that a line stays a line in a narrow terminal and for grep.
    print(f"{'entry':>6}  {'time (UTC)':<19}  {'job':<12}  {'party':<12}  event and details")
    chain = Chain()
    with log.open_copy(path) as (_, lines):
        for entry in map(chain.take, lines):
            when = datetime.fromtimestamp(entry.time, UTC).strftime("%Y-%m-%d %H:%M:%S")
            details = "".join(f" {name}={value}" for name, value in sorted(entry.details.items()))
            job, party = (entry.job or "-")[:12], (entry.party or "-")[:12]
            print(f"{entry.seq:>6}  {when}  {job:<12}  {party:<12}  {entry.event}{details}")
    print(f"{checked.length} entries, the chain is whole")
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
