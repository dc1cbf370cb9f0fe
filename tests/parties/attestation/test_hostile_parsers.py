"""Bad evidence never raises: whatever a library's parser throws becomes a verdict, and one of ours elsewhere."""

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from obfuscatune.errors import FormatError
from obfuscatune.parties.attestation import dcap as dcap_module
from obfuscatune.parties.attestation import snp as snp_module
from obfuscatune.parties.attestation.certificates import Certificate, to_pem
from obfuscatune.parties.attestation.evidence import Evidence, Quote
from obfuscatune.parties.attestation.fields import parsing
from obfuscatune.parties.attestation.simulator import SimulatedPlatform
from obfuscatune.parties.attestation.verify import judge, judge_quote

from .enclaves import evidence, policy
from .samples import failed


class Panic(BaseException):
    """As those of libraries in Rust, which are no Exception."""


@pytest.fixture
def bit_string(simulated_snp: SimulatedPlatform) -> bytes:
    """A VCEK whose subject has a name of type BIT STRING."""
    chain = evidence(simulated_snp).quote.extras["certificates"]
    certificate = x509.load_pem_x509_certificates(chain)[0]
    der = bytearray(certificate.public_bytes(Encoding.DER))
    name = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value.encode()
    at = der.rindex(bytes([len(name)]) + name) - 1
    der[at], der[at + 2] = 0x03, 0
    return bytes(der)


def test_a_name_that_is_a_bit_string(simulated_snp: SimulatedPlatform, bit_string: bytes) -> None:
    with pytest.raises((TypeError, ValueError)):  # what the library does
        _ = x509.load_der_x509_certificate(bit_string).subject
    with pytest.raises(FormatError, match="certificate cannot be read"):
        Certificate(bit_string)
    found = evidence(simulated_snp)
    rest = found.quote.extras["certificates"].split(b"-----END CERTIFICATE-----\n", 1)[1]
    hostile = Quote("snp", found.quote.quote, {"certificates": to_pem(bit_string) + rest})
    assert failed(judge(Evidence(hostile, found.claims), policy(simulated_snp)))[0] == "format"


@pytest.mark.parametrize("error", [TypeError, KeyError, AttributeError, MemoryError, RecursionError, Panic])
@pytest.mark.parametrize("kind", ["tdx", "snp"])
def test_whatever_a_parser_raises_is_a_verdict(
    kind: str, error: type[BaseException], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform: SimulatedPlatform = request.getfixturevalue(f"simulated_{kind}")

    def fail(*_: object) -> None:
        raise error("canary")

    given = evidence(platform)
    monkeypatch.setattr(dcap_module, "_platform", fail)
    monkeypatch.setattr(snp_module, "_platform", fail)
    verdict = judge(given, policy(platform))
    assert not verdict.accepted and failed(verdict)[0] == "format" and "canary" not in str(verdict)
    assert failed(judge_quote(given.quote, policy(platform)))[0] == "format"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_who_stops_the_program_is_obeyed(error: type[BaseException]) -> None:
    with pytest.raises(error), parsing("x"):
        raise error


def test_our_own_errors_keep_their_words() -> None:
    with pytest.raises(FormatError, match="ours"), parsing("x"):
        raise FormatError("ours")
