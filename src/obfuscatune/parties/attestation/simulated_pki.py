"""What both simulated kinds of hardware need: certificates, DER, and flaws.

The simulator plays Intel's and AMD's certificate authorities under a root of its own. Every certificate carries
SIMULATION in its subject, so that none can be taken for a manufacturer's.
"""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.padding import MGF1, PSS
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.serialization import Encoding

MARK = "SIMULATION - NOT SECURE"
ROOT_DAYS = 3650
_AMD_SALT_BYTES = 48

INTEGER, OCTETS, IA5_STRING, ENUMERATED, BOOLEAN, SEQUENCE = 0x02, 0x04, 0x16, 0x0A, 0x01, 0x30


@dataclass(frozen=True)
class Life:
    """From when to when a certificate, a revocation list or a JSON of the manufacturer is good."""

    start: datetime.datetime
    end: datetime.datetime

    @classmethod
    def around(cls, now: float, days: int) -> "Life":
        """Return the life from an hour before ``now`` (Unix seconds), against clocks that differ, to ``days`` after."""
        moment = datetime.datetime.fromtimestamp(int(now), datetime.UTC)
        return cls(moment - datetime.timedelta(hours=1), moment + datetime.timedelta(days=days))


@dataclass(frozen=True)
class Flaws:
    """What is wrong with a simulated platform: for tests that a verifier refuses it."""

    debug: bool = False
    outdated_tcb: bool = False
    expired_collateral: bool = False
    service_td: bool = False  # of a TD 1.5: another TD is bound to it


def name(title: str) -> x509.Name:
    """Return the subject of a simulated certificate."""
    return x509.Name(
        [
            x509.NameAttribute(x509.NameOID.COMMON_NAME, f"{title} {MARK}"),
            x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "obfuscatune simulator"),
        ]
    )


def issue(
    title: str,
    public_key: EllipticCurvePublicKey | RSAPublicKey,
    signer: Any,
    issuer: x509.Certificate | None,
    life: Life,
    *,
    depth: int | None = None,
    extensions: Mapping[str, bytes] | None = None,
) -> x509.Certificate:
    """Return a certificate, signed with ECDSA and SHA-256, or by an RSA key as AMD does: PSS, SHA-384, salt of 48.

    Args:
        title: what it is, in the subject's common name. public_key: of the subject.
        signer: private key of the issuer. issuer: its certificate; None for a root.
        life: when it is good. depth: for an authority, how many may follow below it; None for a leaf.
        extensions: by OID, DER, not critical.
    """
    authority = depth is not None
    usage = x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(title))
        .issuer_name(name(title) if issuer is None else issuer.subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(life.start)
        .not_valid_after(life.end)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=depth), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    for oid, der in (extensions or {}).items():
        builder = builder.add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), der), critical=False)
    if isinstance(signer, RSAPrivateKey):
        return builder.sign(signer, SHA384(), rsa_padding=PSS(MGF1(SHA384()), _AMD_SALT_BYTES))
    return builder.sign(signer, SHA256())


def revocations(issuer: x509.Certificate, signer: Any, life: Life) -> bytes:
    """Return the DER of an empty revocation list."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.subject)
        .last_update(life.start)
        .next_update(life.end)
        .add_extension(x509.CRLNumber(1), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    return builder.sign(signer, SHA256()).public_bytes(Encoding.DER)


def pem(certificates: Sequence[x509.Certificate]) -> bytes:
    """Return a chain, leaf first."""
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def der(tag: int, content: bytes) -> bytes:
    """Return one DER element; its length takes the short form or one or two bytes."""
    size = len(content)
    length = bytes([size]) if size < 128 else bytes([0x81, size]) if size < 256 else b"\x82" + size.to_bytes(2, "big")
    return bytes([tag]) + length + content


def der_integer(value: int) -> bytes:
    """Return the DER of a number that is not negative."""
    return der(INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def der_pair(oid: str, value: bytes) -> bytes:
    """Return the DER of SEQUENCE {oid, value}, ``value`` being DER already."""
    first, second, *rest = (int(part) for part in oid.split("."))
    content = bytearray()
    for number in (first * 40 + second, *rest):
        digits = [number & 0x7F]
        while number := number >> 7:
            digits.append(number & 0x7F | 0x80)
        content += bytes(reversed(digits))
    return der(SEQUENCE, der(0x06, bytes(content)) + value)
