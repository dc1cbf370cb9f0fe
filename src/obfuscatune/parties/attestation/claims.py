"""What an enclave says about itself; as genuine as the quote whose report data binds it."""

import re
from dataclasses import dataclass
from typing import Any

from obfuscatune.errors import FormatError
from obfuscatune.parties.identity import PublicIdentity

FORMAT = "obfuscatune enclave claims 1"
_FIELDS = {"format", "identity", "issued", "nonce", "tls_key", "version"}
_HASH = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"[0-9A-Za-z.+-]{1,32}")
_LAST_SECOND = 1 << 40


@dataclass(frozen=True)
class EnclaveClaims:
    """Who an enclave is and what it is asked.

    Attributes:
        identity: to which files are sealed, and by which the enclave signs.
        tls_key: SHA-256 of the DER SubjectPublicKeyInfo of its TLS key, 64 hex digits.
        nonce: the verifier's 32 bytes, 64 hex digits; empty where nobody asked.
        issued: Unix seconds by the enclave's clock, which its host sets: a nonce proves freshness, this does not.
        version: of this package.
    """

    identity: PublicIdentity
    tls_key: str
    nonce: str
    issued: int
    version: str

    def to_dict(self) -> dict[str, Any]:
        """Return the canonical fields: what ``evidence.report_data`` hashes."""
        return {
            "format": FORMAT,
            "identity": self.identity.to_dict(),
            "issued": self.issued,
            "nonce": self.nonce,
            "tls_key": self.tls_key,
            "version": self.version,
        }

    @classmethod
    def from_dict(cls, fields: Any) -> "EnclaveClaims":
        """Return the claims of ``fields``.

        Raises:
            FormatError: other fields, another format, or a value that is not of its form.
        """
        if not isinstance(fields, dict) or set(fields) != _FIELDS or fields["format"] != FORMAT:
            raise FormatError("no claims of this version", expected=FORMAT)
        identity = PublicIdentity.from_dict(fields["identity"], "claims' identity")
        tls_key, nonce, issued, version = (fields[name] for name in ("tls_key", "nonce", "issued", "version"))
        if not isinstance(tls_key, str) or not _HASH.fullmatch(tls_key):
            raise FormatError("claims' TLS key is no hash", expected="64 hex digits")
        if not isinstance(nonce, str) or not (nonce == "" or _HASH.fullmatch(nonce)):
            raise FormatError("claims' nonce", expected="64 hex digits, or nothing")
        if type(issued) is not int or not 0 <= issued < _LAST_SECOND:
            raise FormatError("claims' time of issue", expected="Unix seconds")
        if not isinstance(version, str) or not _VERSION.fullmatch(version):
            raise FormatError("claims' version", expected="at most 32 letters, digits, '.', '+' and '-'")
        return cls(identity, tls_key, nonce, issued, version)
