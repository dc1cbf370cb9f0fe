"""``obfuscatune identity``: a party's key pair."""

# ruff: noqa: RUF009 - option() makes a field, which is what the rule wants there

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from obfuscatune.cli.options import argument, option, takes
from obfuscatune.durable import write_new
from obfuscatune.errors import ObfuscatuneError, UsageError

HELP = "Make and show identities: the keys by which a party signs, and to which others seal."


@dataclass(frozen=True, kw_only=True)
class NewOptions:
    """Options of ``obfuscatune identity new``."""

    name: str = argument("how the others know you, for instance clinic")
    output_dir: Path = option("directory for NAME.key (secret, mode 0600) and NAME.pub", Path("."))
    suite: Literal["mlkem768-x25519", "x25519"] = option("of the key that others seal to", "mlkem768-x25519")


@takes(NewOptions)
def new(options: NewOptions) -> None:
    """Make an identity: NAME.key stays with you, NAME.pub is for the others."""
    from obfuscatune.parties.canonical import encode
    from obfuscatune.parties.identity import Identity

    identity = Identity.generate(options.name, options.suite)
    secret, public = (options.output_dir / f"{options.name}{suffix}" for suffix in (".key", ".pub"))
    for path in (secret, public):
        if path.exists():
            raise UsageError("file is there already", where=str(path), hint="an identity is never overwritten")
    try:
        options.output_dir.mkdir(parents=True, exist_ok=True)
        write_new(secret, identity.to_bytes())
        write_new(public, encode(identity.public.to_dict()) + b"\n", mode=0o644)
    except OSError as error:
        raise ObfuscatuneError("cannot write the identity", got=error.strerror, where=str(options.output_dir)) from None
    print(f"{public}  {identity.public.fingerprint}")


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
    "new": (new, "Examples:\n\nobfuscatune identity new clinic --output_dir clinic"),
    "show": (show, "Examples:\n\nobfuscatune identity show clinic.pub"),
}
