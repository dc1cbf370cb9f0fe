"""The enclave's TLS certificate: self-signed, with the evidence for its key in it.

The evidence is in the extension 2.23.133.5.4.9 (TCG DICE, tagged evidence) as CBOR

    60000([evidence, claims])

both byte strings: the layout of interoperable RA-TLS. ``evidence`` is `Evidence.to_bytes` without the extras that
belong to the platform rather than to the quote (`PLATFORM_EXTRAS`): a TDX event log alone may be longer than what a TLS
stack takes for a certificate (100 KiB in OpenSSL). They come with the fresh evidence of the handshake. ``claims`` is
the canonical form of the claims in the evidence.
"""

import datetime
import hashlib
import io
import time
import warnings
from dataclasses import dataclass, field

import cbor2
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ec import generate_private_key as generate_ec_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

import obfuscatune
from obfuscatune.errors import AttestationError, FormatError
from obfuscatune.parties.attestation.claims import EnclaveClaims
from obfuscatune.parties.attestation.evidence import Attester, Evidence, Quote, attest
from obfuscatune.parties.canonical import encode
from obfuscatune.parties.identity import PublicIdentity

OID = x509.ObjectIdentifier("2.23.133.5.4.9")
CBOR_TAG = 60000
MAX_CERTIFICATE_BYTES = 64 * 1024  # OpenSSL takes a chain of 100 KiB
PLATFORM_EXTRAS = ("collateral", "event_log")
_TAGGED_PAIR = cbor2.dumps(cbor2.CBORTag(CBOR_TAG, [b"", b""]))[:4]  # tag and list of two
_BYTE_STRING = 2  # CBOR's major type
_NAME = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "obfuscatune enclave")])


@dataclass(frozen=True)
class EnclaveCertificate:
    """A certificate as its owner has it. The private key is secret and never leaves the enclave's memory in plain."""

    der: bytes
    tls_key: str
    private_key: EllipticCurvePrivateKey = field(repr=False)


@dataclass(frozen=True)
class PeerCertificate:
    """What a client reads in the certificate of a connection; nothing in it is verified but its form.

    Attributes:
        digest: SHA-256 of the DER, 64 hex digits.
        tls_key: SHA-256 of the DER SubjectPublicKeyInfo, 64 hex digits; TLS has proved that the peer holds this key.
        evidence: the evidence in the extension, without platform extras.
    """

    digest: str
    tls_key: str
    evidence: Evidence


def fresh_evidence(identity: PublicIdentity, attester: Attester, tls_key: str, nonce: str) -> Evidence:
    """Return evidence of this moment for the enclave's identity, its TLS key and a verifier's nonce ("": none)."""
    claims = EnclaveClaims(identity, tls_key, nonce, int(time.time()), obfuscatune.__version__)
    return attest(attester, claims.to_dict())


def make_certificate(identity: PublicIdentity, attester: Attester) -> EnclaveCertificate:
    """Return a certificate over a new P-256 key, with evidence for key and identity.

    Raises:
        AttestationError: the hardware gives no evidence, or more than fits into a certificate.
    """
    key = generate_ec_key(SECP256R1())
    tls_key = _key_hash(key.public_key())
    evidence = fresh_evidence(identity, attester, tls_key, "")
    extras = {name: data for name, data in evidence.quote.extras.items() if name not in PLATFORM_EXTRAS}
    evidence = Evidence(Quote(evidence.quote.kind, evidence.quote.quote, extras), evidence.claims)
    value = cbor2.dumps(cbor2.CBORTag(CBOR_TAG, [evidence.to_bytes(), encode(dict(evidence.claims))]))
    # Validity is for stacks that insist on one: the age that counts is the one that the claims tell.
    start = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(_NAME)
        .issuer_name(_NAME)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - datetime.timedelta(hours=1))
        .not_valid_after(start + datetime.timedelta(days=1))
        .add_extension(x509.UnrecognizedExtension(OID, value), critical=False)
        .sign(key, SHA256())
    )
    der = certificate.public_bytes(Encoding.DER)
    if len(der) > MAX_CERTIFICATE_BYTES:
        raise AttestationError("evidence does not fit into a certificate", got=len(der), expected=MAX_CERTIFICATE_BYTES)
    return EnclaveCertificate(der, tls_key, key)


def read_certificate(der: bytes) -> PeerCertificate:
    """Read the certificate that the peer of a connection has shown.

    Raises:
        AttestationError: too long, no self-signed certificate of a P-256 key, or no evidence of ours in it.
    """
    if len(der) > MAX_CERTIFICATE_BYTES:
        raise AttestationError("certificate is too long", got=len(der), expected=MAX_CERTIFICATE_BYTES)
    problem: AttestationError | None = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what the parser takes under protest is none that we made
            certificate = x509.load_der_x509_certificate(der)
            key = certificate.public_key()
            # TLS proves the key, not the rest of the certificate; so that no bit of it can be another, this does.
            certificate.verify_directly_issued_by(certificate)
            value = certificate.extensions.get_extension_for_oid(OID).value
        if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP256R1):
            raise AttestationError("certificate is not of a P-256 key", got=type(key).__name__)
        if not isinstance(value, x509.UnrecognizedExtension):
            raise AttestationError("certificate has no evidence of this version")
        tls_key, evidence = _key_hash(key), _read_extension(value.value)
    except x509.ExtensionNotFound:
        problem = AttestationError("certificate has no evidence in it", expected=f"the extension {OID.dotted_string}")
    except FormatError as error:
        problem = AttestationError(f"certificate has no usable evidence: {error.what}")
    except (AttestationError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # parsers raise more than they document, and panics of Rust are no Exception
        problem = AttestationError("certificate cannot be read", got=f"a {type(error).__name__} in the parser")
    if problem is not None:
        raise problem
    return PeerCertificate(hashlib.sha256(der).hexdigest(), tls_key, evidence)


def _read_extension(data: bytes) -> Evidence:
    """Return the evidence; raises FormatError.

    A CBOR decoder may be made to build dates, regular expressions and more by a tag, so it is shown only what begins
    as a byte string; that nothing else is there, and in one form only, is checked by encoding it again.
    """
    try:
        first = _byte_string(data[len(_TAGGED_PAIR) :])
        second = _byte_string(data[len(_TAGGED_PAIR) + len(cbor2.dumps(first)) :])
    except cbor2.CBORDecodeError:
        raise FormatError("not CBOR") from None
    if cbor2.dumps(cbor2.CBORTag(CBOR_TAG, [first, second])) != data:
        raise FormatError("not in canonical form", expected=f"{CBOR_TAG}([evidence, claims])")
    evidence = Evidence.from_bytes(first)
    if encode(dict(evidence.claims)) != second:
        raise FormatError("other claims beside the evidence than in it")
    return evidence


def _byte_string(data: bytes) -> bytes:
    if not data or data[0] >> 5 != _BYTE_STRING:
        raise FormatError("not a byte string")
    value = cbor2.CBORDecoder(io.BytesIO(data)).decode()
    if type(value) is not bytes:
        raise FormatError("not a byte string")
    return value


def _key_hash(key: EllipticCurvePublicKey) -> str:
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()
