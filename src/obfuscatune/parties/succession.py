"""A statement of an identity about itself: who succeeds it, or that nobody does; what is lost is revoked by it.

    canonical JSON of {"format": "obfuscatune succession 1", "identity": public, "signature": .., "successor": public
    or null, "successor_signature": .. or null, "time": Unix seconds}

Both sign ``{format, identity, successor, time}``, each for context "succession": the old identity that it is at its
end, the new one that it has its own key. Whoever trusts the old identity can take the new one without another telephone
call, where the old key was in the right hands; who has lost the key to somebody else revokes it, and hands a new
identity around anew. A statement whose time is still to come is an expiry. There is no way back: of two statements that
differ, as a thief and an owner make them, nobody succeeds.
"""

import base64
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from obfuscatune.errors import FormatError, SealError
from obfuscatune.parties.canonical import decode, encode
from obfuscatune.parties.files import read_small
from obfuscatune.parties.identity import Identity, PublicIdentity

FORMAT = "obfuscatune succession 1"
SUFFIX = ".succession"
MAX_BYTES = 32_768
_CONTEXT = "succession"
_NAMES = {"format", "identity", "signature", "successor", "successor_signature", "time"}


@dataclass(frozen=True)
class Succession:
    """``identity`` ends at ``time`` (Unix seconds, its own clock); ``successor`` is None where it is revoked."""

    identity: PublicIdentity
    successor: PublicIdentity | None
    time: int


def succeed(identity: Identity, successor: Identity | None, *, now: float | None = None) -> bytes:
    """Return the statement that ends an identity: with a successor, or as revoked."""
    public = None if successor is None else successor.public
    record = _record(identity.public, public, int(time.time() if now is None else now))
    message = encode(record)
    new = None if successor is None else base64.b64encode(successor.sign(_CONTEXT, message)).decode()
    old = base64.b64encode(identity.sign(_CONTEXT, message)).decode()
    return encode({**record, "signature": old, "successor_signature": new})


def read_succession(data: bytes, what: str = "succession") -> Succession:
    """Return a statement whose signatures hold.

    Raises:
        FormatError: no statement of this version. SealError: not signed by the identity, or by its successor.
    """
    fields = decode(data.rstrip(b"\n"), what, max_bytes=MAX_BYTES)
    if set(fields) != _NAMES or fields["format"] != FORMAT:
        raise FormatError(f"{what} is none", expected=FORMAT)
    if type(fields["time"]) is not int or not 0 <= fields["time"] <= 1 << 48:
        raise FormatError(f"{what}: time", expected="Unix seconds")
    identity = PublicIdentity.from_dict(fields["identity"], f"identity of the {what}")
    successor = None
    if fields["successor"] is not None:
        successor = PublicIdentity.from_dict(fields["successor"], f"successor in the {what}")
    elif fields["successor_signature"] is not None:
        raise FormatError(f"{what}: a signature of nobody")
    if successor == identity:
        raise FormatError(f"{what}: an identity cannot succeed itself")
    message = encode(_record(identity, successor, fields["time"]))
    if not identity.verify(_signature(fields["signature"], what), _CONTEXT, message):
        raise SealError(f"{what} is not signed by the identity that it ends", got=identity.fingerprint[:16])
    if successor is not None:
        signature = _signature(fields["successor_signature"], what)
        if not successor.verify(signature, _CONTEXT, message):
            raise SealError(f"{what} is not signed by the successor", got=successor.fingerprint[:16])
    return Succession(identity, successor, fields["time"])


def load_successions(directory: Path, now: float | None = None) -> list[Succession]:
    """Return the statements in a directory's ``.succession`` files whose time has come, by the clock if not given.

    Raises: UsageError where one cannot be read, and as `read_succession`.
    """
    found = [
        read_succession(read_small(path, MAX_BYTES, "succession"), f"succession {path}")
        for path in sorted(directory.glob(f"*{SUFFIX}"))
    ]
    return [each for each in found if each.time <= (time.time() if now is None else now)]


def successors(statements: Iterable[Succession]) -> dict[str, PublicIdentity | None]:
    """Return who succeeds each identity that has ended, by fingerprint: None where it was revoked, or in dispute."""
    found: dict[str, PublicIdentity | None] = {}
    for each in statements:
        fingerprint = each.identity.fingerprint
        agreed = fingerprint not in found or found[fingerprint] == each.successor
        found[fingerprint] = each.successor if agreed else None
    return found


def ancestry(identity: PublicIdentity, statements: Iterable[Succession]) -> set[PublicIdentity]:
    """Return an identity and all whom it has succeeded, at once or one after the other."""
    found, known = {identity}, list(statements)
    while more := {each.identity for each in known if each.successor in found} - found:
        found |= more
    return found


def _record(identity: PublicIdentity, successor: PublicIdentity | None, when: int) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "identity": identity.to_dict(),
        "successor": None if successor is None else successor.to_dict(),
        "time": when,
    }


def _signature(value: Any, what: str) -> bytes:
    try:
        data = base64.b64decode(value, validate=True) if isinstance(value, str) else b""
    except ValueError:
        data = b""
    if len(data) != 64 or base64.b64encode(data).decode() != value:
        raise FormatError(f"{what}: a signature that is not the base64 of 64 bytes")
    return data
