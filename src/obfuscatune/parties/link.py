"""Identities on a worker's link: the certificates that they sign, and the check of the one that a worker shows.

A leaf is an X.509 certificate of a fresh P-256 key, signed by an identity's Ed25519 key. Its extension holds the public
identity in canonical form. Its extended key usage says which end it is for, so that a worker's leaf is none for an
enclave. An anchor stands for an identity that may connect: a certificate of its Ed25519 key. Nobody but its owner could
sign that, and nobody has to: OpenSSL takes a trust anchor from who loads it, and does not check its signature.

What the Ed25519 key signs here begins with the byte 0x30 (DER), and every other message of an identity with "o".
"""

import datetime
import os
import warnings
from collections.abc import Iterable
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1
from cryptography.hazmat.primitives.asymmetric.ec import generate_private_key as generate_ec_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, SignatureAlgorithmOID

from obfuscatune.errors import AttestationError, FormatError
from obfuscatune.parties.canonical import decode, encode
from obfuscatune.parties.identity import Identity, PublicIdentity
from obfuscatune.protocol.tls import Credentials

# Of a UUID (ITU-T X.667), which needs no registration.
OID = x509.ObjectIdentifier("2.25.197320957162243529043287645518463905213")
MAX_CERTIFICATE_BYTES = 16 * 1024
_LIFETIME = datetime.timedelta(days=365)  # of a leaf; its key dies with the process before, or it is started again
_SKEW = datetime.timedelta(days=1)  # of the two machines' clocks
_USAGE = {"worker": ExtendedKeyUsageOID.SERVER_AUTH, "enclave": ExtendedKeyUsageOID.CLIENT_AUTH}


def credentials_of(
    identity: Identity, role: Literal["worker", "enclave"], *, allow: Iterable[PublicIdentity] = ()
) -> Credentials:
    """Return what an identity shows on links of this process, with a fresh TLS key; ``allow``: who may connect."""
    key, password = generate_ec_key(SECP256R1()), os.urandom(32).hex()
    public = identity.public
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        _builder(public, now)
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"obfuscatune {role}")]))
        .public_key(key.public_key())
        .not_valid_after(now + _LIFETIME)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([_USAGE[role]]), critical=True)
        .add_extension(x509.UnrecognizedExtension(OID, encode(public.to_dict())), critical=False)
    )
    leaf = identity.sign_certificate(builder).public_bytes(Encoding.PEM)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(password.encode()))
    anchors = "".join(_anchor(each, now) for each in allow)
    return Credentials(public.fingerprint, (leaf + pem).decode(), password, anchors)


def check_worker(der: bytes | None, fingerprint: str, where: str) -> PublicIdentity:
    """Return the identity of the worker whose leaf this is, if it has the pinned fingerprint.

    TLS has proved that the peer holds the leaf's key; this proves that the pinned identity has signed the leaf.

    Raises:
        AttestationError: another identity, a leaf that is not of a worker, not signed by it, expired, or unreadable.
    """
    if der is None or len(der) > MAX_CERTIFICATE_BYTES:
        raise AttestationError("the worker shows no usable certificate", where=where)
    problem: AttestationError | None = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what the parser takes under protest is none that we made
            leaf = x509.load_der_x509_certificate(der)
            identity = _identity_in(leaf)
            if identity.fingerprint != fingerprint:
                raise AttestationError(
                    "the worker has another identity",
                    got=f"{identity.name} {identity.fingerprint}",
                    expected=fingerprint,
                    where=where,
                    hint="compare with its owner: obfuscatune identity show NAME.pub; or somebody stands between",
                )
            if der[-len(leaf.signature) - 1 :] != b"\0" + leaf.signature:
                raise ValueError  # how many bits of the signature are none, which no parser looks at
            if leaf.signature_algorithm_oid != SignatureAlgorithmOID.ED25519:
                raise InvalidSignature
            Ed25519PublicKey.from_public_bytes(identity.signing_key).verify(leaf.signature, leaf.tbs_certificate_bytes)
            usage = list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        now = datetime.datetime.now(datetime.UTC)
        if usage != [ExtendedKeyUsageOID.SERVER_AUTH]:
            problem = AttestationError("the certificate is not one of a worker", where=where)
        elif not leaf.not_valid_before_utc <= now <= leaf.not_valid_after_utc:
            hint = "start the worker again; or compare the clocks of the two machines"
            problem = AttestationError("the worker's certificate has expired, or begins later", where=where, hint=hint)
    except InvalidSignature:
        problem = AttestationError("the worker's certificate is not signed by the identity that it names", where=where)
    except (AttestationError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # parsers raise more than they document, and panics of Rust are no Exception
        problem = AttestationError(
            "the worker's certificate cannot be read", got=f"a {type(error).__name__} in the parser", where=where
        )
    if problem is not None:
        raise problem
    return identity


def _identity_in(leaf: x509.Certificate) -> PublicIdentity:
    value = leaf.extensions.get_extension_for_oid(OID).value
    if not isinstance(value, x509.UnrecognizedExtension):
        raise FormatError("no identity in the certificate")
    return PublicIdentity.from_dict(decode(value.value, "identity in a certificate", max_bytes=MAX_CERTIFICATE_BYTES))


def _anchor(public: PublicIdentity, now: datetime.datetime) -> str:
    builder = (
        _builder(public, now)
        .subject_name(_issuer(public))
        .public_key(Ed25519PublicKey.from_public_bytes(public.signing_key))
        .not_valid_after(now + 100 * _LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    )
    return builder.sign(Ed25519PrivateKey.generate(), None).public_bytes(Encoding.PEM).decode()


def _builder(public: PublicIdentity, now: datetime.datetime) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .issuer_name(_issuer(public))
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
    )


def _issuer(public: PublicIdentity) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, public.fingerprint)])
