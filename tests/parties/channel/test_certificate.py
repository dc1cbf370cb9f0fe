"""The certificate: evidence in the DICE extension, one encoding, hostile ones refused."""

import os
from collections.abc import Callable
from typing import Any

import cbor2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from obfuscatune.errors import AttestationError, FormatError
from obfuscatune.parties.attestation.evidence import Evidence, Quote, report_data
from obfuscatune.parties.attestation.platform import Platform
from obfuscatune.parties.attestation.policy import Policy
from obfuscatune.parties.canonical import encode
from obfuscatune.parties.channel import certificate as certificates
from obfuscatune.parties.channel import fetch_evidence
from obfuscatune.parties.channel.certificate import (
    CBOR_TAG,
    MAX_CERTIFICATE_BYTES,
    OID,
    PLATFORM_EXTRAS,
    make_certificate,
    read_certificate,
)
from obfuscatune.parties.identity import Identity

from .attackers import certificate_of, forged_certificate
from .conftest import Enclave

ENCLAVE = Identity.generate("enclave")


class Attester:
    """Makes quotes of any size that nobody has to believe."""

    def __init__(self, size: int = 4000, **extras: bytes) -> None:
        self.size, self.extras = size, extras

    def quote(self, data: bytes) -> Quote:
        return Quote("tdx", data + bytes(self.size), self.extras)


def value_of(der: bytes) -> bytes:
    extension = x509.load_der_x509_certificate(der).extensions.get_extension_for_oid(OID)
    assert isinstance(extension.value, x509.UnrecognizedExtension)
    return extension.value.value


def test_layout_of_the_extension() -> None:
    made = make_certificate(ENCLAVE.public, Attester(certificates=b"pem"))
    tag = cbor2.loads(value_of(made.der))
    assert (tag.tag, len(tag.value)) == (60000, 2)
    evidence = Evidence.from_bytes(bytes(tag.value[0]))
    assert tag.value[1] == encode(dict(evidence.claims))
    assert evidence.quote.quote[:64] == report_data(evidence.claims)
    assert evidence.claims["nonce"] == ""
    peer = read_certificate(made.der)
    assert peer.evidence == evidence
    assert peer.tls_key == made.tls_key == evidence.claims["tls_key"]
    assert evidence.quote.extras == {"certificates": b"pem"}
    parsed = x509.load_der_x509_certificate(made.der)
    assert not parsed.extensions.get_extension_for_oid(OID).critical
    assert len(list(parsed.extensions)) == 1


def test_each_certificate_has_a_key_of_its_own() -> None:
    keys = {make_certificate(ENCLAVE.public, Attester()).tls_key for _ in range(3)}
    assert len(keys) == 3


def test_what_belongs_to_the_platform_is_left_out_however_large(
    start: Callable[..., Enclave], platform: Platform, owner: Identity, policy: Policy
) -> None:
    """A TDX event log is longer than what TLS takes; it comes with the fresh evidence."""

    class Logging:
        def quote(self, data: bytes) -> Quote:
            quote = platform.attester.quote(data)
            return Quote(quote.kind, quote.quote, {**quote.extras, "event_log": os.urandom(200_000)})

    enclave = start(attester=Logging())
    der = certificate_of(enclave.address)
    assert len(der) < 20_000
    assert not set(read_certificate(der).evidence.quote.extras) & set(PLATFORM_EXTRAS)
    evidence, _ = fetch_evidence(enclave.address)
    assert len(evidence.quote.extras["event_log"]) == 200_000


def test_simulated_evidence_fits(enclave: Enclave) -> None:
    assert len(enclave.server._certificate.der) < MAX_CERTIFICATE_BYTES // 4


def test_evidence_that_does_not_fit_is_refused_where_it_is_made() -> None:
    with pytest.raises(AttestationError, match="does not fit into a certificate"):
        make_certificate(ENCLAVE.public, Attester(size=50_000))


GENUINE = make_certificate(ENCLAVE.public, Attester(size=40))
PAIR = list(cbor2.loads(value_of(GENUINE.der)).value)


def tagged(*items: Any, tag: int = CBOR_TAG) -> bytes:
    return cbor2.dumps(cbor2.CBORTag(tag, list(items)))


def test_the_forger_is_the_control() -> None:
    assert (
        read_certificate(forged_certificate(value=tagged(*PAIR)).der).evidence == read_certificate(GENUINE.der).evidence
    )


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"\xd9",
        PAIR[0],
        tagged(*PAIR)[:-1],
        tagged(*PAIR) + b"\0",
        tagged(*PAIR, tag=60001),
        tagged(PAIR[0]),
        tagged(*PAIR, b""),
        tagged(PAIR[1], PAIR[0]),
        tagged(PAIR[0], encode({})),
        tagged(PAIR[0].decode(), PAIR[1].decode()),
        cbor2.dumps(PAIR),
        # the same bytes in other words: a length of eight bytes, and chunks
        tagged(*PAIR)[:4] + b"\x5b" + len(PAIR[0]).to_bytes(8, "big") + PAIR[0] + cbor2.dumps(PAIR[1]),
        tagged(*PAIR)[:4] + b"\x5f" + cbor2.dumps(PAIR[0]) + b"\xff" + cbor2.dumps(PAIR[1]),
        tagged(*PAIR)[:4] + b"\x5b" + b"\xff" * 8,
        # what a decoder of CBOR might build: a regular expression, a date, a huge number, a shared value
        tagged(cbor2.CBORTag(35, "(a+)+$"), PAIR[1]),
        tagged(PAIR[0], cbor2.CBORTag(0, "2026-01-01T00:00:00Z")),
        tagged(PAIR[0], cbor2.CBORTag(4, [2**40, 1])),
        tagged(*PAIR)[:4] + b"\xd8\x1c\x81\xd8\x1d\x00" * 2,
        tagged(*PAIR)[:4] + b"\x81" * 5000,
    ],
)
def test_another_content_of_the_extension_is_refused(value: bytes) -> None:
    with pytest.raises(AttestationError, match="certificate has no usable evidence"):
        read_certificate(forged_certificate(value=value).der)


@given(st.binary(max_size=200) | st.binary(max_size=200).map((tagged(b"", b"")[:4] + b"\x44").__add__))
def test_any_bytes_in_the_extension(value: bytes) -> None:
    with pytest.raises(FormatError):
        certificates._read_extension(value)


def test_other_certificates_are_refused() -> None:
    with pytest.raises(AttestationError, match="has no evidence in it"):
        read_certificate(forged_certificate().der)
    for key in (generate_private_key(SECP384R1()), Ed25519PrivateKey.generate()):
        der = self_signed(key, None if isinstance(key, Ed25519PrivateKey) else SHA256())
        with pytest.raises(AttestationError, match="not of a P-256 key"):
            read_certificate(der)
    with pytest.raises(AttestationError, match="too long"):
        read_certificate(GENUINE.der + bytes(MAX_CERTIFICATE_BYTES))
    for der in (b"", b"\x30\x80", GENUINE.der[:-1], GENUINE.der + b"\0", os.urandom(500)):
        with pytest.raises(AttestationError, match="cannot be read"):
            read_certificate(der)


def self_signed(key: Any, algorithm: Any) -> bytes:
    parsed = x509.load_der_x509_certificate(GENUINE.der)
    builder = x509.CertificateBuilder(parsed.subject, parsed.subject, key.public_key(), 1)
    builder = builder.not_valid_before(parsed.not_valid_before_utc).not_valid_after(parsed.not_valid_after_utc)
    value = x509.UnrecognizedExtension(OID, tagged(*PAIR))
    return builder.add_extension(value, critical=False).sign(key, algorithm).public_bytes(Encoding.DER)


def test_a_certificate_signed_by_another_key_is_refused() -> None:
    parsed = x509.load_der_x509_certificate(GENUINE.der)
    other = forged_certificate().private_key
    builder = x509.CertificateBuilder(parsed.subject, parsed.subject, GENUINE.private_key.public_key(), 1)
    builder = builder.not_valid_before(parsed.not_valid_before_utc).not_valid_after(parsed.not_valid_after_utc)
    builder = builder.add_extension(x509.UnrecognizedExtension(OID, tagged(*PAIR)), critical=False)
    with pytest.raises(AttestationError, match="cannot be read"):
        read_certificate(builder.sign(other, SHA256()).public_bytes(Encoding.DER))
    read_certificate(builder.sign(GENUINE.private_key, SHA256()).public_bytes(Encoding.DER))
