"""A card: what a partner must know of a sealed file to name it in a job, and nothing of what is in it.

    canonical JSON of {"format": "obfuscatune card 1", "head": prefix and header, "signature": .., "table": SHA-256}

in base64. It is the file's own signed outside without the hashes of its chunks, a few kilobytes: digest, kind, sender,
recipients, sizes and terms, verified by the sender's signature. A job names a file by its digest, which the card saves
people from copying.
"""

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path

from obfuscatune.errors import FormatError, SealError
from obfuscatune.parties.canonical import decode, encode, unbase64
from obfuscatune.parties.files import read_small
from obfuscatune.parties.sealed.fields import (
    MAGIC,
    MAX_HEADER_BYTES,
    PREFIX,
    SIGNATURE_BYTES,
    VERSION,
    Header,
    header_hash,
)
from obfuscatune.parties.sealed.header import CONTEXT, digest, open_file, read_exactly, read_header

FORMAT = "obfuscatune card 1"
MAX_BYTES = 2 * MAX_HEADER_BYTES


@dataclass(frozen=True)
class Card:
    """A sealed file's header, signed by ``header.sender``, and its digest."""

    header: Header
    digest: str


def make_card(path: Path) -> bytes:
    """Return the card of a sealed file; raises as `read_header`."""
    signed = read_header(path)
    head = bytearray(signed.payload_offset)
    signature = bytearray(SIGNATURE_BYTES)
    with open_file(path) as file:
        read_exactly(file, 0, memoryview(head), f"sealed file {path}")
        read_exactly(file, signed.file_bytes - SIGNATURE_BYTES, memoryview(signature), f"sealed file {path}")
    parts = {"head": bytes(head), "signature": bytes(signature), "table": hashlib.sha256(signed.table).digest()}
    return encode({"format": FORMAT, **{name: base64.b64encode(data).decode() for name, data in parts.items()}})


def read_card(path: Path) -> Card:
    """Read the card of a sealed file, or the sealed file itself, and verify its sender's signature.

    Raises:
        UsageError: it cannot be read. FormatError: neither. SealError: changed.
    """
    with open_file(path) as file:
        start = file.read(len(MAGIC))
    if start == MAGIC:
        signed = read_header(path)
        return Card(signed.header, signed.digest)
    what = f"card {path}"
    fields = decode(read_small(path, MAX_BYTES, "card").rstrip(b"\n"), what, max_bytes=MAX_BYTES)
    if set(fields) != {"format", "head", "signature", "table"} or fields["format"] != FORMAT:
        raise FormatError(f"{what} is no card, and no sealed file", expected=FORMAT)
    head, signature, table = (unbase64(fields[name], what) for name in ("head", "signature", "table"))
    if len(head) < PREFIX.size or PREFIX.unpack(head[: PREFIX.size]) != (
        *(MAGIC, VERSION, bytes(3)),
        len(head) - PREFIX.size,
    ):
        raise FormatError(f"{what} holds no header of a sealed file")
    header = Header.from_bytes(head[PREFIX.size :], f"header in {what}")
    hashes = header_hash(head) + table
    if not header.sender.verify(signature, CONTEXT, hashes):
        raise SealError(f"{what} was changed", got="a signature that is not the sender's")
    return Card(header, digest(hashes))
