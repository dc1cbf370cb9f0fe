"""What all attesters have in common: where a quote has what, bounded reading of the kernel's files, the sealing key."""

from collections.abc import Mapping
from pathlib import Path

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from obfuscatune.errors import AttestationError, FormatError
from obfuscatune.parties.attestation.dcap_layout import body_of
from obfuscatune.parties.attestation.evidence import MAX_QUOTE_BYTES, Attester, Kind, Quote

REPORT_DATA_BYTES = 64
_OWN = ("mrenclave", "mrsigner", "mrtd", "rtmr0", "rtmr1", "rtmr2", "rtmr3")
SEALING_KEY_BYTES = 32
_SNP_BYTES, _SNP_REPORT_DATA, _SNP_MEASUREMENT = 0x4A0, slice(0x50, 0x90), slice(0x90, 0xC0)


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
    if len(raw) > MAX_QUOTE_BYTES or (kind == "snp" and len(raw) < _SNP_BYTES):
        got = f"{len(raw)} bytes"
        raise AttestationError(f"the platform's {kind} quote has an impossible length", got=got)
    if _bound(kind, raw) != report_data:
        raise AttestationError(
            f"the platform's {kind} quote is over other report data than ours",
            hint="another process asked for a quote at the same moment; try again",
        )
    return Quote(kind, raw, dict(extras))


def _bound(kind: Kind, raw: bytes) -> bytes:
    """Return the report data in a quote of this machine; raises AttestationError where it has another form."""
    if kind == "snp":
        return raw[_SNP_REPORT_DATA]
    try:
        return body_of(raw, kind).report_data
    except FormatError as error:
        raise AttestationError(f"the platform's {kind} quote: {error.what}", got=error.got) from None


def own_measurements(attester: Attester) -> dict[str, str]:
    """Return the measurements in a quote of this moment, in hexadecimal; raises AttestationError as the attester."""
    quote = attester.quote(bytes(REPORT_DATA_BYTES))
    if quote.kind == "snp":
        return {"measurement": quote.quote[_SNP_MEASUREMENT].hex()}
    found = body_of(quote.quote, quote.kind).measurements
    return {name: value for name, value in found.items() if name in _OWN}


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
