"""The structures of a TPM that a quote consists of, read byte for byte, with every length checked before it is used.

Source: TCG, Trusted Platform Module Library, part 2 (TPMS_ATTEST, TPMS_QUOTE_INFO, TPMT_SIGNATURE). All numbers are
big-endian; a TPM2B is two bytes of length and that many bytes. Nothing may follow the last field.
"""

from dataclasses import dataclass
from typing import Literal

from obfuscatune.errors import FormatError
from obfuscatune.parties.attestation.fields import Fields

Bank = Literal["sha256", "sha384", "sha512"]
# TPM_ALG_ID of the hashes that we take; SHA-1 is not among them.
BANKS: dict[int, Bank] = {0x000B: "sha256", 0x000C: "sha384", 0x000D: "sha512"}
DIGEST_BYTES: dict[Bank, int] = {"sha256": 32, "sha384": 48, "sha512": 64}
PCR_COUNT = 24

_MAGIC = 0xFF544347  # TPM_GENERATED_VALUE: a restricted key signs nothing of other origin that starts with it
_QUOTE = 0x8018  # TPM_ST_ATTEST_QUOTE
_MAX_NAME_BYTES = 66  # algorithm and a hash
_MAX_RSA_BYTES = 512
_MAX_ECC_BYTES = 66  # a coordinate of P-521

SignatureScheme = Literal["rsassa", "rsapss", "ecdsa"]
_SCHEMES: dict[int, SignatureScheme] = {0x0014: "rsassa", 0x0016: "rsapss", 0x0018: "ecdsa"}


@dataclass(frozen=True)
class TpmQuote:
    """A TPMS_ATTEST of type quote.

    Attributes:
        extra_data: the qualifying data, chosen by who asked. firmware: version of the TPM's firmware, 64 bits.
        selection: the quoted PCRs as (bank, index), in the order in which the digest takes them.
        pcr_digest: hash of the values of these PCRs, one after another, by the hash of the signature.
    """

    extra_data: bytes
    firmware: int
    selection: tuple[tuple[Bank, int], ...]
    pcr_digest: bytes


@dataclass(frozen=True)
class TpmSignature:
    """A TPMT_SIGNATURE: for RSA one number, for ECDSA r and s, all as big-endian bytes."""

    scheme: SignatureScheme
    hash: Bank
    numbers: tuple[bytes, ...]


def parse_quote(data: bytes) -> TpmQuote:
    """Return the quote in ``data``; it is not verified.

    Raises:
        FormatError: another structure, a length beyond its limit, a hash that we do not take, or bytes left over.
    """
    reader = _Structure(data, "TPM quote")
    if reader.number(4) != _MAGIC or reader.number(2) != _QUOTE:
        raise FormatError("not a TPM quote", expected="magic ff544347 and type 8018")
    reader.sized(_MAX_NAME_BYTES)  # who signed, by name; what counts is the key that verifies
    extra_data = reader.sized(64)
    reader.take(8 + 4 + 4)  # clock, resets and restarts: this TPM's own, not the time of day
    if reader.number(1) > 1:
        raise FormatError("TPM quote with a clock state that is neither safe nor unsafe")
    firmware = reader.number(8)
    selection = _selection(reader)
    quote = TpmQuote(extra_data, firmware, selection, reader.sized(64))
    reader.end()
    return quote


def parse_signature(data: bytes) -> TpmSignature:
    """Return the signature in ``data``; raises FormatError as `parse_quote` does."""
    reader = _Structure(data, "TPM signature")
    scheme, hashed = _SCHEMES.get(reader.number(2)), BANKS.get(reader.number(2))
    if scheme is None or hashed is None:
        raise FormatError("TPM signature of an unknown kind", expected="RSASSA, RSAPSS or ECDSA with SHA-2")
    sizes = (_MAX_ECC_BYTES, _MAX_ECC_BYTES) if scheme == "ecdsa" else (_MAX_RSA_BYTES,)
    numbers = tuple(reader.sized(size) for size in sizes)
    reader.end()
    return TpmSignature(scheme, hashed, numbers)


def _selection(reader: "_Structure") -> tuple[tuple[Bank, int], ...]:
    found: list[tuple[Bank, int]] = []
    count = reader.number(4)
    if not 1 <= count <= len(BANKS):
        raise FormatError("TPM quote over too many banks of PCRs, or none", got=count, expected=f"1 to {len(BANKS)}")
    for _ in range(count):
        bank = BANKS.get(reader.number(2))
        if bank is None or any(bank == other for other, _ in found):
            raise FormatError("TPM quote with an unknown bank of PCRs, or one twice", expected=", ".join(DIGEST_BYTES))
        bits = int.from_bytes(reader.sized(PCR_COUNT // 8, prefix=1), "little")
        found += [(bank, index) for index in range(PCR_COUNT) if bits >> index & 1]
    return tuple(found)


class _Structure(Fields):
    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def sized(self, most: int, prefix: int = 2) -> bytes:
        size = self.number(prefix)
        if size > most:
            raise FormatError(f"{self._what} with a field that is too long", got=size, expected=f"at most {most}")
        return self.take(size)
