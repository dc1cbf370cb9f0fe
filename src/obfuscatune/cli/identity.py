"""``obfuscatune identity``: a party's key pair."""

# ruff: noqa: RUF009 - option() makes a field, which is what the rule wants there

import datetime
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from obfuscatune.cli.options import argument, option, takes
from obfuscatune.cli.output import check_new_file, check_place
from obfuscatune.durable import write_new
from obfuscatune.errors import FormatError, ObfuscatuneError, UsageError

HELP = "Make and show identities: the keys by which a party signs, and to which others seal."


@dataclass(frozen=True, kw_only=True)
class NewOptions:
    """Options of ``obfuscatune identity new``."""

    name: str = argument("how the others know you, for instance clinic")
    output_dir: Path = option("directory for NAME.key (secret, mode 0600) and NAME.pub", Path("."))
    suite: Literal["mlkem768-x25519", "x25519"] = option("of the key that others seal to", "mlkem768-x25519")
    passphrase: bool = option("ask for a passphrase, under which NAME.key is kept", False, flag="--passphrase")


@takes(NewOptions)
def new(options: NewOptions) -> None:
    """Make an identity: NAME.key stays with you, NAME.pub is for the others."""
    from obfuscatune.parties.canonical import encode
    from obfuscatune.parties.identity import Identity
    from obfuscatune.parties.passphrase import new_passphrase

    identity = Identity.generate(options.name, options.suite)
    check_place(options.output_dir, f"--output_dir {options.output_dir}")
    secret, public = (options.output_dir / f"{options.name}{suffix}" for suffix in (".key", ".pub"))
    for path in (secret, public):
        if os.path.lexists(path):
            raise UsageError("file is there already", where=str(path), hint="an identity is never overwritten")
    content = identity.lock(new_passphrase(f"{secret}")) if options.passphrase else identity.to_bytes()
    try:
        options.output_dir.mkdir(parents=True, exist_ok=True)
        write_new(secret, content)
        write_new(public, encode(identity.public.to_dict()) + b"\n", mode=0o644)
    except OSError as error:
        raise ObfuscatuneError("cannot write the identity", got=error.strerror, where=str(options.output_dir)) from None
    print(f"{public}  {identity.public.fingerprint}")


@dataclass(frozen=True, kw_only=True)
class LockOptions:
    """Options of ``obfuscatune identity lock``."""

    file: Path = argument("a NAME.key file, open or locked")


@takes(LockOptions)
def lock(options: LockOptions) -> None:
    """Put a secret identity under a passphrase, or under another one; the file is replaced.

    The passphrase is asked at the terminal. Without one, OBFUSCATUNE_PASSPHRASE_FILE names a file of mode 0600 that has
    it, from a secret manager for instance; all verbs that use the key read it there too.
    """
    from obfuscatune.durable import rename, write_private
    from obfuscatune.parties.identity import Identity
    from obfuscatune.parties.passphrase import new_passphrase

    identity = Identity.load(options.file)
    file = options.file.resolve()  # of a link what it leads to: the open key must not stay there
    if file.stat().st_nlink > 1:
        hint = "remove the other names first: the open key would stay under them"
        raise UsageError("identity file has other names too (hard links)", where=str(options.file), hint=hint)
    content = identity.lock(new_passphrase(f"{options.file}, the new one"))
    beside = file.with_name(f".{file.name}.new")
    try:
        write_private(beside, content)
        rename(beside, file)
    except OSError as error:
        raise ObfuscatuneError("cannot write the identity", got=error.strerror, where=str(options.file)) from None
    print(f"{options.file}  locked; what the open file was written on may still hold it", file=sys.stderr)


@dataclass(frozen=True, kw_only=True)
class RevokeOptions:
    """Options of ``obfuscatune identity revoke``."""

    file: Path = argument("the NAME.key file of the identity that ends")
    on: str | None = option("day of its end (UTC), as 2027-06-30; default: now", None)
    output: Path | None = option("the statement; default: NAME.succession beside the key", None)


@takes(RevokeOptions)
def revoke(options: RevokeOptions) -> None:
    """Write a statement, signed by an identity, that ends it for good. Make it in time, and keep it elsewhere.

    With --on it is an expiry date, to be sent out together with NAME.pub.

    The operator puts it into parties/: the enclave then lets nobody connect with this identity and starts none of its
    jobs. A partner accepts the statement with `party verify --partner NAME.succession`.
    """
    from obfuscatune.parties.identity import Identity
    from obfuscatune.parties.succession import SUFFIX, read_succession, succeed

    path, end = options.output or options.file.with_suffix(SUFFIX), None
    check_new_file(path, "--output")
    if options.on is not None:
        try:
            day = datetime.date.fromisoformat(options.on)  # a time of day would have a zone, which none asked for
            end = datetime.datetime.combine(day, datetime.time.min, datetime.UTC).timestamp()
        except ValueError:
            raise UsageError("not a day", got=repr(options.on), expected="--on 2027-06-30") from None
    statement = succeed(Identity.load(options.file), None, now=end)
    try:
        identity = read_succession(statement).identity
    except FormatError:  # nobody would accept it
        raise UsageError(
            "not a day that a statement can have", got=repr(options.on), expected="1970 or later"
        ) from None
    try:
        write_new(path, statement + b"\n", mode=0o644)
    except FileExistsError:
        raise UsageError("file is there already", where=str(path)) from None
    except OSError as error:
        raise ObfuscatuneError("cannot write the statement", got=error.strerror, where=str(path)) from None
    print(f"{path}  ends {identity.name}  {identity.fingerprint}")


@dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """Options of ``obfuscatune identity show``."""

    file: Path = argument("a NAME.pub file")


@takes(ShowOptions)
def show(options: ShowOptions) -> None:
    """Print name and fingerprint, to be compared with its owner over another channel."""
    from obfuscatune.parties.identity import PublicIdentity

    identity = PublicIdentity.load(options.file)
    print(f"{identity.name}  {identity.suite}  {identity.fingerprint}")


COMMANDS = {
    "new": (new, "Examples:\n\nobfuscatune identity new clinic --output_dir clinic --passphrase"),
    "lock": (lock, "Examples:\n\nobfuscatune identity lock clinic.key"),
    "revoke": (
        revoke,
        "Examples:\n\nobfuscatune identity revoke clinic.key --output safe/clinic.succession\n\n"
        "obfuscatune identity revoke clinic.key --on 2027-06-30",
    ),
    "show": (show, "Examples:\n\nobfuscatune identity show clinic.pub"),
}
