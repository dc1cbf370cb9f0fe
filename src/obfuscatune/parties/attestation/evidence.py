"""The evidence record: a quote of the hardware, what is needed to check it, and the claims that it binds.

The quote carries 64 bytes of the attester's choice, the report data. Ours is

    report data = SHA-512("obfuscatune claims 1" || 0x00 || canonical JSON of the claims)

so the claims (the enclave's public identity, the hash of its TLS key, the verifier's nonce, the time) are as genuine as
the quote, and can be read.
"""

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

from obfuscatune.errors import FormatError
from obfuscatune.parties.canonical import decode, encode

Kind = Literal["sgx", "tdx", "snp", "tpm", "nitro", "azure"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FORMAT = "obfuscatune evidence 1"
MAX_EVIDENCE_BYTES = 512 * 1024
MAX_QUOTE_BYTES = 64 * 1024
_DOMAIN = b"obfuscatune claims 1\0"


@dataclass(frozen=True)
class Quote:
    """What an attester makes: the hardware's quote over 64 bytes, and what a verifier may need beside it.

    Attributes:
        kind: format of ``quote``: a DCAP quote (sgx, tdx), an SEV-SNP report (snp), a TPMS_ATTEST (tpm),
            a COSE document (nitro), an HCL report (azure).
        quote: its raw bytes.
        extras: by name, all untrusted until verified: ``certificates`` (snp: PEM of VCEK, ASK, ARK), ``collateral``
            (sgx, tdx: the JSON of dcap-qvl), ``event_log`` (tdx), ``signature``, ``key`` and ``pcrs`` (tpm),
            ``tpm_quote``, ``signature``, ``pcrs``, and ``certificates`` or ``td_quote`` (azure), ``gpu_report`` and
            ``gpu_certificates`` (all: of the machine's GPU).
    """

    kind: Kind
    quote: bytes
    extras: Mapping[str, bytes] = field(default_factory=dict)


class Attester(Protocol):
    """A source of quotes on this machine."""

    def quote(self, report_data: bytes) -> Quote:
        """Return a fresh quote over ``report_data``, 64 bytes; raises AttestationError where there is none to have."""
        ...


@dataclass(frozen=True)
class Evidence:
    """A quote and the claims that its report data binds."""

    quote: Quote
    claims: Mapping[str, Any]

    def to_bytes(self) -> bytes:
        """Return the canonical encoding."""
        extras = {name: base64.b64encode(data).decode() for name, data in self.quote.extras.items()}
        return encode(
            {
                "claims": dict(self.claims),
                "extras": extras,
                "format": FORMAT,
                "kind": self.quote.kind,
                "quote": base64.b64encode(self.quote.quote).decode(),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> "Evidence":
        """Return the record of ``data``; nothing in it is verified yet.

        Raises:
            FormatError: too long, another format or version, an unknown kind, or fields of a wrong type.
        """
        fields = decode(data, "evidence", max_bytes=MAX_EVIDENCE_BYTES)
        if set(fields) != {"claims", "extras", "format", "kind", "quote"} or fields["format"] != FORMAT:
            raise FormatError("not evidence of this version", expected=FORMAT)
        if fields["kind"] not in KINDS:
            raise FormatError("evidence of an unknown kind", expected=", ".join(KINDS))
        if (
            not isinstance(fields["claims"], dict)
            or not isinstance(fields["extras"], dict)
            or len(fields["extras"]) > 8
        ):
            raise FormatError("evidence with claims or extras of a wrong type")
        extras = {name: _bytes(text, f"evidence's {name}") for name, text in fields["extras"].items()}
        quote = _bytes(fields["quote"], "evidence's quote")
        if len(quote) > MAX_QUOTE_BYTES:
            raise FormatError("quote is too long", got=f"{len(quote)} bytes", expected=f"at most {MAX_QUOTE_BYTES}")
        return cls(Quote(fields["kind"], quote, extras), fields["claims"])


def report_data(claims: Mapping[str, Any]) -> bytes:
    """Return the 64 bytes that bind ``claims``: the equation at the head of this module."""
    return hashlib.sha512(_DOMAIN + encode(dict(claims))).digest()


def attest(attester: Attester, claims: Mapping[str, Any]) -> Evidence:
    """Return fresh evidence for ``claims``; raises AttestationError where the hardware gives none."""
    return Evidence(attester.quote(report_data(claims)), dict(claims))


def _bytes(text: Any, what: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True) if isinstance(text, str) else None
    except ValueError:
        data = None
    if data is None or base64.b64encode(data).decode() != text:
        raise FormatError(f"{what} is not base64")
    return data
