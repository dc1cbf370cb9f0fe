"""What all attesters have in common: where a quote has what, bounded reading of the kernel's files, the sealing key."""

from collections.abc import Mapping
from pathlib import Path

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from obfuscatune.errors import AttestationError
from obfuscatune.parties.attestation.evidence import MAX_QUOTE_BYTES, Attester, Kind, Quote

REPORT_DATA_BYTES = 64
SEALING_KEY_BYTES = 32
# Where the report data are: the header (48) and their place in the body of DCAP quotes v3 and v4; in the SNP report.
_REPORT_DATA_AT: dict[Kind, int] = {"sgx": 48 + 320, "tdx": 48 + 520, "snp": 0x50}
_LEAST_BYTES: dict[Kind, int] = {"sgx": 48 + 384, "tdx": 48 + 584, "snp": 0x4A0}
# By the names of a policy: offset and size.
_MEASUREMENTS_AT: dict[Kind, dict[str, tuple[int, int]]] = {
    "sgx": {"mrenclave": (48 + 64, 32), "mrsigner": (48 + 128, 32)},
    "tdx": {"mrtd": (48 + 136, 48), **{f"rtmr{number}": (48 + 328 + 48 * number, 48) for number in range(4)}},
    "snp": {"measurement": (0x90, 48)},
}


def check_report_data(report_data: bytes) -> None:
    """Raise AttestationError unless these are 64 bytes."""
    if len(report_data) != REPORT_DATA_BYTES:
        raise AttestationError("report data", got=f"{len(report_data)} bytes", expected=REPORT_DATA_BYTES)


def bound_quote(kind: Kind, raw: bytes, report_data: bytes, extras: Mapping[str, bytes]) -> Quote:
    """Return the record of a quote as the platform gave it.

    Another process of the same machine may ask at the same moment through the same files. The verifier would refuse
    the quote that was meant for the other; here we say why.

    Raises:
        AttestationError: too long, too short, or over other report data.
    """
    at = _REPORT_DATA_AT[kind]
    if not _LEAST_BYTES[kind] <= len(raw) <= MAX_QUOTE_BYTES:
        raise AttestationError(
            f"the platform's {kind} quote has an impossible length",
            got=f"{len(raw)} bytes",
            expected=f"{_LEAST_BYTES[kind]} to {MAX_QUOTE_BYTES}",
        )
    if raw[at : at + REPORT_DATA_BYTES] != report_data:
        raise AttestationError(
            f"the platform's {kind} quote is over other report data than ours",
            hint="another process asked for a quote at the same moment; try again",
        )
    return Quote(kind, raw, dict(extras))


def own_measurements(attester: Attester) -> dict[str, str]:
    """Return the measurements in a quote of this moment, in hexadecimal; raises AttestationError as the attester."""
    quote = attester.quote(bytes(REPORT_DATA_BYTES))
    places = _MEASUREMENTS_AT[quote.kind]
    return {name: quote.quote[at : at + size].hex() for name, (at, size) in places.items()}


def read_bounded(path: Path, max_bytes: int, what: str) -> bytes:
    """Return the content of a file of the kernel; raises AttestationError where it cannot be read or is longer."""
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise AttestationError(f"cannot read the {what}", got=error.strerror, where=str(path)) from None
    if len(data) > max_bytes:
        raise AttestationError(f"the {what} is too long", expected=f"at most {max_bytes} bytes", where=str(path))
    return data


def derive_sealing_key(secret: bytes, context: bytes = b"") -> bytes:
    """Return HKDF-SHA256(secret, info = "obfuscatune sealing key 1" || 0x00 || context), 32 bytes. Secret.

    Args:
        secret: a key that the platform keeps for this code alone, or for all code on it. Secret.
        context: in the latter case the measurement of the code, so that other code gets another key. Public.
    """
    info = b"obfuscatune sealing key 1\0" + context
    return HKDF(algorithm=SHA256(), length=SEALING_KEY_BYTES, salt=None, info=info).derive(secret)
