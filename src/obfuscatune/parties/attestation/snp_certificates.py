"""The certificates that a host hands to its SEV-SNP guests beside a report. They come from the host: hostile bytes.

A table of entries of 24 bytes, ended by one of zeros, and after it the certificates in DER (GHCB specification 2.0,
section 4.1.8.1): GUID (16 bytes, in the order in which it is written), offset and length (32 bits, little endian; the
offset counts from the start of the table).
"""

import ssl
import struct
import uuid

from obfuscatune.errors import AttestationError

MAX_TABLE_BYTES = 32 * 1024  # the kernel takes half of it
MAX_ENTRIES = 16
_ENTRY = struct.Struct("<16sII")
_END = bytes(16)
_VCEK, _VLEK, _ASK, _ARK = (
    uuid.UUID(text).bytes
    for text in (
        "63da758d-e664-4564-adc5-f4b93be8accd",
        "a8074bc2-a25a-483e-aae6-39c045a0b8a1",
        "4ab7b379-bbac-4fe4-a02f-05aef327c782",
        "c0b406a4-a803-4952-9743-3fb6014cd0ae",
    )
)
_FLAGS_AT = 0x48  # in the report; bits 2 to 4 say which key signed it
_SIGNED_BY_VLEK = 1


def certificate_chain(table: bytes, report: bytes) -> bytes:
    """Return the PEM of the key that signed ``report`` (VCEK or VLEK), ASK and ARK, as far as the table has them.

    Nothing is verified but the form: a verifier judges the chain, and may have one of its own.

    Raises:
        AttestationError: too long, an entry outside of the table, twice, or not one certificate in DER.
    """
    found = _entries(table)
    flags = int.from_bytes(report[_FLAGS_AT : _FLAGS_AT + 4], "little")
    leaf = _VLEK if flags >> 2 & 7 == _SIGNED_BY_VLEK else _VCEK
    return b"".join(_to_pem(found[guid]) for guid in (leaf, _ASK, _ARK) if guid in found)


def _entries(table: bytes) -> dict[bytes, bytes]:
    if len(table) > MAX_TABLE_BYTES:
        raise AttestationError(
            "table of certificates", got=f"{len(table)} bytes", expected=f"at most {MAX_TABLE_BYTES}"
        )
    entries: dict[bytes, bytes] = {}
    for at in range(0, MAX_ENTRIES * _ENTRY.size, _ENTRY.size):
        if at + _ENTRY.size > len(table):
            raise AttestationError("table of certificates has no end", got=f"{len(table)} bytes")
        guid, offset, size = _ENTRY.unpack_from(table, at)
        if guid == _END:
            return entries
        if guid in entries or offset + size > len(table):
            raise AttestationError(
                "table of certificates: an entry twice, or outside of it", got=str(uuid.UUID(bytes=guid))
            )
        entries[guid] = table[offset : offset + size]
    raise AttestationError("table of certificates", got=f"more than {MAX_ENTRIES} entries")


def _to_pem(data: bytes) -> bytes:
    """Return the PEM of a DER element of two length bytes, as every certificate of AMD is, without padding."""
    size = 4 + int.from_bytes(data[2:4], "big")
    if data[:2] != b"\x30\x82" or size > len(data):
        raise AttestationError("table of certificates: an entry is no certificate in DER", got=f"{len(data)} bytes")
    return ssl.DER_cert_to_PEM_cert(data[:size]).encode()
