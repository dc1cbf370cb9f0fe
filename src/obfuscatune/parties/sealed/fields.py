"""The header of a sealed file as a record: who sealed what kind of thing for whom, in which sizes, on which terms.

All of it is public and nothing of it depends on the content. Reading it checks form and limits only; that the sender
signed it is checked in `header`.
"""

import base64
import hashlib
import re
import struct
from dataclasses import dataclass
from typing import Any, Literal, get_args

from obfuscatune.errors import FormatError
from obfuscatune.parties.canonical import decode, encode
from obfuscatune.parties.identity import PublicIdentity

Kind = Literal["model", "data", "prompts", "adapter", "output", "report", "checkpoint"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FORMAT = "obfuscatune sealed file 1"
MAGIC, VERSION = b"OBSF", 1
PREFIX = struct.Struct("<4sB3sI")  # magic, version, three zeros, length of the header
MAX_HEADER_BYTES = 65_536
MAX_TERMS_BYTES = 16_384
MAX_RECIPIENTS = 16
CHUNK_SIZES = tuple(1 << bits for bits in range(12, 21))
# The table of hashes is held in memory while a file is open (32 MiB), and GCM stays far from its limits under one key.
MAX_CHUNKS = 1 << 20
TAG_BYTES, HASH_BYTES, SIGNATURE_BYTES = 16, 32, 64
_WRAPPED_BYTES = (32 + 32 + TAG_BYTES, 1120 + 32 + TAG_BYTES)  # HPKE's encapsulation (by suite), data key, tag
_NAMES = {
    *("chunk_bytes", "commitment", "created", "format", "id"),
    *("kind", "payload_bytes", "recipients", "sender", "terms"),
}
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Recipient:
    """One who can open the file: fingerprint (64 hex digits), and the data key under HPKE for it. Public."""

    fingerprint: str
    wrapped_key: bytes


@dataclass(frozen=True)
class Header:
    """What stands before the payload.

    Attributes:
        kind: what the payload is. id: 32 random bytes, fresh for each file. created: Unix seconds, the sender's clock.
        chunk_bytes: plain bytes of every chunk but the last, one of CHUNK_SIZES. payload_bytes: of all, at least 1.
        sender: who signed. recipients: 1 to 16, each once. commitment: 32 bytes that fix the data key (`keys`).
        terms: the owner's conditions, or None.
    """

    kind: Kind
    id: bytes
    created: int
    chunk_bytes: int
    payload_bytes: int
    sender: PublicIdentity
    recipients: tuple[Recipient, ...]
    commitment: bytes
    terms: dict[str, Any] | None

    @property
    def chunks(self) -> int:
        """How many chunks the payload has."""
        return -(-self.payload_bytes // self.chunk_bytes)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all that follows the header: chunks with their tags, table of hashes, signature."""
        return self.payload_bytes + self.chunks * (TAG_BYTES + HASH_BYTES) + SIGNATURE_BYTES

    def chunk_size(self, index: int) -> int:
        """Return the plain bytes of chunk ``index``."""
        return min(self.chunk_bytes, self.payload_bytes - index * self.chunk_bytes)

    def to_bytes(self) -> bytes:
        """Return prefix and canonical header: what is hashed and written; FormatError where a reader would refuse."""
        recipients = [
            {"fingerprint": recipient.fingerprint, "wrapped_key": base64.b64encode(recipient.wrapped_key).decode()}
            for recipient in self.recipients
        ]
        data = encode(
            {
                "chunk_bytes": self.chunk_bytes,
                "commitment": self.commitment.hex(),
                "created": self.created,
                "format": FORMAT,
                "id": self.id.hex(),
                "kind": self.kind,
                "payload_bytes": self.payload_bytes,
                "recipients": recipients,
                "sender": self.sender.to_dict(),
                "terms": self.terms,
            }
        )
        Header.from_bytes(data, "header of the sealed file")
        return PREFIX.pack(MAGIC, VERSION, bytes(3), len(data)) + data

    @classmethod
    def from_bytes(cls, data: bytes, what: str) -> "Header":
        """Return the header that ``data`` encodes (without prefix); ``what`` names it in errors.

        Raises:
            FormatError: not canonical, other fields, a type, size or number beyond what the format allows.
        """
        fields = decode(data, what, max_bytes=MAX_HEADER_BYTES)
        if set(fields) != _NAMES or fields["format"] != FORMAT:
            raise FormatError(f"{what} has other fields", expected=FORMAT)
        if fields["kind"] not in KINDS:
            raise FormatError(f"{what}: unknown kind", expected=", ".join(KINDS))
        chunk_bytes, payload_bytes, created = fields["chunk_bytes"], fields["payload_bytes"], fields["created"]
        if type(chunk_bytes) is not int or chunk_bytes not in CHUNK_SIZES:
            raise FormatError(f"{what}: chunk size", expected=f"a power of two, {CHUNK_SIZES[0]} to {CHUNK_SIZES[-1]}")
        if type(payload_bytes) is not int or not 1 <= payload_bytes <= MAX_CHUNKS * chunk_bytes:
            raise FormatError(f"{what}: payload size", expected=f"1 to {MAX_CHUNKS * chunk_bytes} bytes")
        if type(created) is not int or not 0 <= created < 1 << 48:
            raise FormatError(f"{what}: time", expected="Unix seconds")
        terms = fields["terms"]
        if terms is not None and not isinstance(terms, dict):
            raise FormatError(f"{what}: terms", got=type(terms).__name__, expected="an object or null")
        if len(encode(terms)) > MAX_TERMS_BYTES:
            raise FormatError(f"{what}: terms are too long", expected=f"at most {MAX_TERMS_BYTES} bytes")
        return cls(
            kind=fields["kind"],
            id=_hash(fields["id"], f"{what}: id"),
            created=created,
            chunk_bytes=chunk_bytes,
            payload_bytes=payload_bytes,
            sender=PublicIdentity.from_dict(fields["sender"], f"sender in {what}"),
            recipients=_recipients(fields["recipients"], what),
            commitment=_hash(fields["commitment"], f"{what}: commitment"),
            terms=terms,
        )


def header_hash(head: bytes) -> bytes:
    """Return SHA-256 of prefix and header: what the payload's key, the signature and the digest bind."""
    return hashlib.sha256(head).digest()


def _recipients(rows: Any, what: str) -> tuple[Recipient, ...]:
    if not isinstance(rows, list) or not 1 <= len(rows) <= MAX_RECIPIENTS:
        raise FormatError(f"{what}: recipients", expected=f"a list of 1 to {MAX_RECIPIENTS}")
    found: dict[str, Recipient] = {}
    for row in rows:
        if not isinstance(row, dict) or set(row) != {"fingerprint", "wrapped_key"}:
            raise FormatError(f"{what}: a recipient with other fields", expected="fingerprint and wrapped_key")
        fingerprint = _hash(row["fingerprint"], f"{what}: a recipient's fingerprint").hex()
        if fingerprint in found:
            raise FormatError(f"{what}: a recipient is there twice", got=f"{fingerprint[:16]}...")
        found[fingerprint] = Recipient(fingerprint, _wrapped(row["wrapped_key"], f"{what}: a wrapped key"))
    return tuple(found.values())


def _hash(text: Any, what: str) -> bytes:
    if not isinstance(text, str) or not _HEX.fullmatch(text):
        raise FormatError(what, expected="64 hex digits in lower case")
    return bytes.fromhex(text)


def _wrapped(text: Any, what: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except ValueError:
        data = b""
    if len(data) not in _WRAPPED_BYTES or base64.b64encode(data).decode() != text:
        raise FormatError(what, expected=f"the base64 of {' or '.join(map(str, _WRAPPED_BYTES))} bytes")
    return data
