"""The outside of a sealed file: prefix, header, table of hashes and signature, read and verified without any key.

    table     = SHA-256 of chunk 0 || SHA-256 of chunk 1 || ...         (of the ciphertext, tags included)
    signature = Ed25519(sender, context "sealed file", header hash || SHA-256(table))
    digest    = SHA-256("obfuscatune sealed file digest 1" || 0x00 || header hash || SHA-256(table))

Who knows the data key can make chunks that decrypt, but not one that stands in the sender's table. The digest names the
file in a job; data key and id are fresh in each file, so that it confirms no guess at the content.
"""

import hashlib
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from obfuscatune.errors import FormatError, SealError, UsageError
from obfuscatune.parties.sealed.fields import (
    HASH_BYTES,
    MAGIC,
    MAX_HEADER_BYTES,
    PREFIX,
    SIGNATURE_BYTES,
    VERSION,
    Header,
    header_hash,
)

CONTEXT = "sealed file"
_DIGEST_DOMAIN = b"obfuscatune sealed file digest 1\0"


@dataclass(frozen=True)
class SignedHeader:
    """A header that its sender has signed, together with the hash of every chunk.

    Attributes:
        header: the record. header_hash: 32 bytes. payload_offset: where chunk 0 begins. file_bytes: of the whole file.
        table: 32 bytes a chunk. digest: 64 hex digits, what a job names.
    """

    header: Header
    header_hash: bytes
    payload_offset: int
    file_bytes: int
    table: bytearray = field(repr=False)  # up to 32 MiB: never copied
    digest: str


def read_header(path: Path) -> SignedHeader:
    """Read and verify the outside of a sealed file; no key is needed.

    The signature says that the holder of ``header.sender`` made the file; whether that is who it should be is for the
    caller to compare, by fingerprint.

    Raises:
        UsageError: it cannot be read. FormatError: it is no sealed file of this version. SealError: cut or changed.
    """
    with open_file(path) as file:
        return read_signed(file, path)


def read_signed(file: BinaryIO, path: Path) -> SignedHeader:
    """As :func:`read_header`, from the open ``file``; ``path`` names it in errors."""
    what = f"sealed file {path}"
    size = os.fstat(file.fileno()).st_size
    magic, version, reserved, length = PREFIX.unpack(_read(file, 0, PREFIX.size, size, what))
    if magic != MAGIC:
        raise FormatError(f"{what} is none", got="another magic", hint="`obfuscatune seal` makes sealed files")
    if version != VERSION:
        raise FormatError(f"{what} has another version", got=version, expected=VERSION)
    if reserved != bytes(3):
        raise FormatError(f"{what} has a reserved byte that is not zero")
    if length > MAX_HEADER_BYTES:
        raise FormatError(f"{what}: header is too long", got=length, expected=f"at most {MAX_HEADER_BYTES} bytes")
    head = bytes(_read(file, 0, PREFIX.size + length, size, what))
    header = Header.from_bytes(head[PREFIX.size :], f"header of {what}")
    expected = len(head) + header.stored_bytes
    if size != expected:
        raise SealError(f"{what} was cut or appended to", got=f"{size} bytes", expected=expected)
    table_bytes = header.chunks * HASH_BYTES
    table = _read(file, expected - SIGNATURE_BYTES - table_bytes, table_bytes, size, what)
    signature = _read(file, expected - SIGNATURE_BYTES, SIGNATURE_BYTES, size, what)
    hashes = signed_hashes(header_hash(head), table)
    if not header.sender.verify(bytes(signature), CONTEXT, hashes):
        raise SealError(f"{what} was changed", got="a signature that is not the sender's")
    return SignedHeader(header, header_hash(head), len(head), size, table, digest(hashes))


def signed_hashes(header_hash: bytes, table: bytes | bytearray) -> bytes:
    """Return the 64 bytes that the sender signs: header hash and table hash."""
    return header_hash + hashlib.sha256(table).digest()


def digest(hashes: bytes) -> str:
    """Return the digest of the file with these signed hashes."""
    return hashlib.sha256(_DIGEST_DOMAIN + hashes).hexdigest()


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading, unbuffered; raises UsageError for anything else."""
    try:
        # Without O_NONBLOCK, opening a pipe that nobody writes to waits for ever.
        file = open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    except OSError as error:
        raise UsageError("cannot read the sealed file", got=error.strerror, where=str(path)) from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UsageError("cannot read the sealed file", got="no regular file", where=str(path))
    return file


def read_exactly(file: BinaryIO, offset: int, buffer: memoryview, what: str) -> None:
    """Fill ``buffer`` from ``offset`` on.

    Raises:
        SealError: the file ends before that: it was cut while it was open.
        UsageError: the disk gives an error.
    """
    done = 0
    while done < len(buffer):
        try:
            file.seek(offset + done)  # not preadv, which Gramine has not
            count = file.readinto(buffer[done:])  # type: ignore[attr-defined]
        except OSError as error:
            raise UsageError(f"cannot read the {what}", got=error.strerror) from None
        if not count:
            raise SealError(f"{what} was cut while it was read")
        done += count


def _read(file: BinaryIO, offset: int, length: int, size: int, what: str) -> bytearray:
    """Return ``length`` bytes, which must be there in a file of ``size``: checked before anything is allocated."""
    if offset + length > size:
        raise FormatError(f"{what} is too short to be one", got=f"{size} bytes")
    data = bytearray(length)
    read_exactly(file, offset, memoryview(data), what)
    return data
