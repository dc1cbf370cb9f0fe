"""Certificate chains that come with evidence: one spelling each, and AMD's serial numbers of zero."""

import base64

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePublicKey

from obfuscatune.errors import FormatError
from obfuscatune.parties.attestation.fields import parsing

MAX_CHAIN_BYTES = 32 * 1024
MAX_CERTIFICATES = 6
# How a certificate of version 3 with the serial number 0 begins: two long headers, [0] { INTEGER 2 }, INTEGER 0.
_HEADERS = slice(0, 8)
_ZERO_SERIAL = bytes.fromhex("a003020102 020100")
_LINE = 64
_BASE_CONSTRAINTS = "2.5.29.19"
_BEGIN, _END = b"-----BEGIN CERTIFICATE-----\n", b"-----END CERTIFICATE-----\n"


class Certificate:
    """An X.509 certificate and the bytes that its issuer signed.

    AMD's VCEKs have the serial number 0. RFC 5280 forbids it, `cryptography` 50 warns and a later one will refuse.
    Such a certificate is read with the serial number 1 in its place, and its signature is checked over the bytes as
    they are.
    """

    def __init__(self, der: bytes) -> None:
        self.der = der
        at = _HEADERS.stop + len(_ZERO_SERIAL) - 1
        zero = der[_HEADERS.stop : at + 1] == _ZERO_SERIAL and der[0:2] == der[4:6] == b"\x30\x82"
        readable = der[:at] + b"\1" + der[at + 1 :] if zero else der
        with parsing("certificate"):
            self.fields = x509.load_der_x509_certificate(readable)
            signed = self.fields.tbs_certificate_bytes
            self.extensions = {item.oid.dotted_string: item.value for item in self.fields.extensions}
            self.key = self.fields.public_key()
            # The library reads these only when they are asked for, and raises then.
            _ = self.fields.issuer, self.fields.subject, self.valid_at(0.0)
        self.signed = signed[: at - 4] + b"\0" + signed[at - 3 :] if zero else signed
        # A certificate names its algorithm twice, once in what is signed: `cryptography` lets the two differ.
        rest = der[4 + len(signed) :]
        if der[:2] != b"\x30\x82" or len(rest) < 2 or rest[: 2 + rest[1]] not in signed:
            raise FormatError("certificate names another algorithm than the one that is signed")

    def issued_by(self, issuer: "Certificate") -> bool:
        """Return whether ``issuer`` has signed this, by ECDSA or PKCS #1 v1.5, as Intel does."""
        try:
            with parsing("certificate"):
                self.fields.verify_directly_issued_by(issuer.fields)
        except FormatError:  # InvalidSignature among others
            return False
        return True

    def valid_at(self, now: float) -> bool:
        """Return whether Unix second ``now`` is within its life."""
        start, end = self.fields.not_valid_before_utc, self.fields.not_valid_after_utc
        return start.timestamp() <= now <= end.timestamp()


def read_chain(pem: bytes, what: str) -> list[Certificate]:
    """Return the certificates of a PEM text in their order; CRLF line ends and an empty line between are let pass.

    Raises:
        FormatError: too long, too many, none, anything between or around the certificates, or one that cannot be read.
    """
    text = pem.replace(b"\r\n", b"\n").rstrip(b"\n") + b"\n"
    blocks = text.split(_END)
    if len(pem) > MAX_CHAIN_BYTES or not 2 <= len(blocks) <= MAX_CERTIFICATES + 1 or blocks.pop():
        raise FormatError(f"{what} are no chain of at most {MAX_CERTIFICATES} PEM certificates")
    # Azure's service leaves a line empty between them.
    return [_read_block(block.removeprefix(b"\n") if number else block, what) for number, block in enumerate(blocks)]


def p384_chain_problem(chain: list[Certificate], now: float) -> str:
    """Return what is wrong with a chain of P-384 keys, root first, at Unix second ``now``; "" where nothing is."""
    for issuer, certificate in zip([chain[0], *chain], chain, strict=False):
        if not isinstance(certificate.key, EllipticCurvePublicKey) or not isinstance(certificate.key.curve, SECP384R1):
            return "a certificate without a P-384 key"
        if not certificate.issued_by(issuer):
            return "a certificate that its issuer has not signed"
        if not certificate.valid_at(now):
            return f"a certificate outside its life, which ends {certificate.fields.not_valid_after_utc:%Y-%m-%d %H:%M}"
        constraints = certificate.extensions.get(_BASE_CONSTRAINTS)
        authority = isinstance(constraints, x509.BasicConstraints) and constraints.ca
        if authority == (certificate is chain[-1]):
            return "an issuer that is no authority, or a last certificate that is one"
        limit = constraints.path_length if isinstance(constraints, x509.BasicConstraints) else None
        if limit is not None and len(chain) - 2 - chain.index(certificate) > limit:
            return "a chain that is longer than a certificate of it allows"
    return ""


def to_pem(der: bytes) -> bytes:
    """Return the PEM text of a certificate in the usual form."""
    text = base64.b64encode(der)
    return _BEGIN + b"".join(text[at : at + _LINE] + b"\n" for at in range(0, len(text), _LINE)) + _END


def _read_block(block: bytes, what: str) -> Certificate:
    try:
        der = base64.b64decode(block.removeprefix(_BEGIN).replace(b"\n", b""), validate=True)
    except ValueError:
        der = b""
    # Base64 has several spellings of the same bytes: only the usual one is read.
    if not der or block + _END != to_pem(der):
        raise FormatError(f"{what} are not PEM in the usual form")
    return Certificate(der)
