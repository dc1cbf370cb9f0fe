"""The simulator's formats, against dcap-qvl and a check of SNP written out here; what is wrong is refused by both."""

import json
import multiprocessing
import os
import stat
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import dcap_qvl
import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
from cryptography.hazmat.primitives.asymmetric.padding import MGF1, PSS
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding

from obfuscatune.errors import AttestationError, FormatError, UsageError
from obfuscatune.parties.attestation.evidence import Evidence, Quote, attest
from obfuscatune.parties.attestation.measurement import measure_code
from obfuscatune.parties.attestation.simulated_pki import MARK, Flaws, der, der_integer, der_pair
from obfuscatune.parties.attestation.simulator import FileCounter, SimulatedPlatform

SHARED = Path(__file__).parents[3] / ".." / "shared" / "attestation"
REPORT_DATA = bytes(range(64))
MRTD_AT = 48 + 136


@pytest.fixture(scope="session")
def tdx(tmp_path_factory: pytest.TempPathFactory) -> SimulatedPlatform:
    return SimulatedPlatform.create(tmp_path_factory.mktemp("hardware") / "tdx")


@pytest.fixture(scope="session")
def snp(tmp_path_factory: pytest.TempPathFactory) -> SimulatedPlatform:
    return SimulatedPlatform.create(tmp_path_factory.mktemp("hardware") / "snp", "snp")


def root_der(platform: SimulatedPlatform) -> bytes:
    return x509.load_pem_x509_certificate(platform.root.read_bytes()).public_bytes(Encoding.DER)


def flawed(platform: SimulatedPlatform, **flaws: bool) -> SimulatedPlatform:
    return SimulatedPlatform(platform.root.parent, flaws=Flaws(**flaws))


def verify_tdx(quote: Quote, root: bytes | None, now: float | None = None) -> dict[str, object]:
    """Return the claims under the library's strict policy; raises ValueError. No root: Intel's."""
    second = int(time.time() if now is None else now)
    collateral = dcap_qvl.QuoteCollateralV3.from_json(quote.extras["collateral"].decode())
    policy = dcap_qvl.QuotePolicy.strict(second)
    claims = dcap_qvl.QuoteVerifier(root).verify_with_policy(quote.quote, collateral, second, policy)
    fields: dict[str, object] = json.loads(claims.to_json())
    return fields


def verify_snp(quote: Quote, root: bytes, now: float | None = None) -> x509.Certificate:
    """Return the VCEK after checking chain and report; raises ValueError or InvalidSignature."""
    chain = x509.load_pem_x509_certificates(quote.extras["certificates"])
    if len(chain) != 3 or chain[2].public_bytes(Encoding.DER) != root:
        raise ValueError("another root")
    for certificate, issuer in zip(chain, [chain[1], chain[2], chain[2]], strict=True):
        if not certificate.not_valid_before_utc.timestamp() <= (now or time.time()):
            raise ValueError("not yet valid")
        if certificate.not_valid_after_utc.timestamp() < (now or time.time()):
            raise ValueError("expired")
        issuer.public_key().verify(
            certificate.signature, certificate.tbs_certificate_bytes, PSS(MGF1(SHA384()), 48), SHA384()
        )
    r, s = (int.from_bytes(quote.quote[at : at + 72], "little") for at in (0x2A0, 0x2A0 + 72))
    chain[0].public_key().verify(encode_dss_signature(r, s), quote.quote[:0x2A0], ECDSA(SHA384()))
    return chain[0]


def changed(quote: Quote, at: int) -> Quote:
    raw = bytearray(quote.quote)
    raw[at] ^= 1
    return Quote(quote.kind, bytes(raw), quote.extras)


def test_a_tdx_quote_is_accepted_under_the_simulations_root(tdx: SimulatedPlatform) -> None:
    quote = tdx.attester.quote(REPORT_DATA)
    claims = verify_tdx(quote, root_der(tdx))
    assert claims["tcb"]["status"] == "UpToDate"  # type: ignore[index]
    report = dcap_qvl.parse_quote(quote.quote).report
    assert report.report_data == REPORT_DATA
    assert report.mr_td.hex() == measure_code().hex() == tdx.measurements()["mrtd"]
    assert tdx.measurements()["rtmr3"] == report.rt_mr3.hex() == "00" * 48


def test_a_tdx_quote_is_refused_under_intels_root_and_under_another_simulations(
    tdx: SimulatedPlatform, tmp_path: Path
) -> None:
    quote = tdx.attester.quote(REPORT_DATA)
    for root in (None, root_der(SimulatedPlatform.create(tmp_path / "other"))):
        # The first thing of the root's that the library looks at is the revocation list that it signs.
        with pytest.raises(ValueError, match="root CA CRL"):
            verify_tdx(quote, root)


@pytest.mark.parametrize("at", [0x08, MRTD_AT, 48 + 120, 48 + 520, 48 + 584 + 4, 48 + 584 + 4 + 128 + 6])
def test_a_tdx_quote_that_was_changed_is_refused(tdx: SimulatedPlatform, at: int) -> None:
    with pytest.raises(ValueError, match="Verification failed"):
        verify_tdx(changed(tdx.attester.quote(REPORT_DATA), at), root_der(tdx))


@pytest.mark.parametrize("field", ["tcb_info", "qe_identity"])
def test_collateral_that_was_changed_is_refused(tdx: SimulatedPlatform, field: str) -> None:
    quote = tdx.attester.quote(REPORT_DATA)
    collateral = json.loads(quote.extras["collateral"])
    collateral[field] = collateral[field].replace("2026-01-01", "2026-01-02", 1)
    with pytest.raises(ValueError, match="ignature"):
        verify_tdx(Quote("tdx", quote.quote, {"collateral": json.dumps(collateral).encode()}), root_der(tdx))


@pytest.mark.parametrize(
    ("flaw", "message"),
    [("debug", "Debug mode"), ("outdated_tcb", "OutOfDate"), ("expired_collateral", "Expired")],
)
def test_a_flawed_tdx_platform_is_refused(tdx: SimulatedPlatform, flaw: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        verify_tdx(flawed(tdx, **{flaw: True}).attester.quote(REPORT_DATA), root_der(tdx))


def test_collateral_expires(tdx: SimulatedPlatform) -> None:
    quote = tdx.attester.quote(REPORT_DATA)
    verify_tdx(quote, root_der(tdx), time.time() + 29 * 86_400)
    with pytest.raises(ValueError, match="Expired"):
        verify_tdx(quote, root_der(tdx), time.time() + 31 * 86_400)


def test_a_platform_is_the_same_after_a_restart(tdx: SimulatedPlatform) -> None:
    again = SimulatedPlatform(tdx.root.parent)
    first, second = (verify_tdx(each.attester.quote(REPORT_DATA), root_der(tdx)) for each in (tdx, again))
    assert first["platform"]["pck"] == second["platform"]["pck"]  # type: ignore[index]
    assert again.sealing_key() == tdx.sealing_key()


def test_an_snp_report_is_accepted_under_the_simulations_root(snp: SimulatedPlatform) -> None:
    quote = snp.attester.quote(REPORT_DATA)
    vcek = verify_snp(quote, root_der(snp))
    report = quote.quote
    assert len(report) == 1184
    assert report[0x50:0x90] == REPORT_DATA
    assert report[0x90:0xC0].hex() == measure_code().hex() == snp.measurements()["measurement"]
    extensions = {item.oid.dotted_string: getattr(item.value, "value", None) for item in vcek.extensions}
    assert extensions["1.3.6.1.4.1.3704.1.4"] == report[0x1A0:0x1E0]
    for number, at in ((1, 0), (2, 1), (3, 6), (8, 7)):
        assert extensions[f"1.3.6.1.4.1.3704.1.3.{number}"] == der_integer(report[0x180 + at])
    assert not int.from_bytes(report[8:16], "little") >> 19 & 1


@pytest.mark.parametrize("at", [0x08, 0x50, 0x90, 0x180, 0x1A0, 0x29F, 0x2A0, 0x2E8])
def test_an_snp_report_that_was_changed_is_refused(snp: SimulatedPlatform, at: int) -> None:
    with pytest.raises(InvalidSignature):
        verify_snp(changed(snp.attester.quote(REPORT_DATA), at), root_der(snp))


def test_an_snp_report_is_refused_under_another_root(snp: SimulatedPlatform, tdx: SimulatedPlatform) -> None:
    with pytest.raises(ValueError, match="another root"):
        verify_snp(snp.attester.quote(REPORT_DATA), root_der(tdx))


def test_flawed_snp_platforms_say_so(snp: SimulatedPlatform) -> None:
    debug = flawed(snp, debug=True).attester.quote(REPORT_DATA)
    verify_snp(debug, root_der(snp))
    assert int.from_bytes(debug.quote[8:16], "little") >> 19 & 1
    old = flawed(snp, outdated_tcb=True).attester.quote(REPORT_DATA)
    verify_snp(old, root_der(snp))
    new = snp.attester.quote(REPORT_DATA)
    assert all(old.quote[0x180 + at] < new.quote[0x180 + at] for at in (0, 6, 7))
    with pytest.raises(ValueError, match="expired"):
        verify_snp(flawed(snp, expired_collateral=True).attester.quote(REPORT_DATA), root_der(snp))


def test_the_layout_is_that_of_real_reports(snp: SimulatedPlatform) -> None:
    """A real VCEK has the extensions that ours has, and what is zero in a real report is zero in ours."""
    if not SHARED.exists():
        pytest.skip("no ../shared/attestation")
    real = bytes.fromhex("".join((SHARED / "snp" / "virtee_report_milan.hex").read_text().split()))
    ours = snp.attester.quote(REPORT_DATA).quote
    assert len(real) == len(ours)
    assert [real[at : at + 4] for at in (0, 0x34)] == [ours[at : at + 4] for at in (0, 0x34)]
    for start, end in ((0x4C, 0x50), (0x188, 0x1A0), (0x1F8, 0x2A0), (0x330, 0x4A0)):
        assert not any(real[start:end])
        assert not any(ours[start:end])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # AMD's serial number of 0
        vcek = x509.load_der_x509_certificate((SHARED / "snp" / "virtee_vcek_milan.der").read_bytes())
        theirs = {item.oid.dotted_string for item in vcek.extensions}
    mine = {item.oid.dotted_string for item in verify_snp(snp.attester.quote(REPORT_DATA), root_der(snp)).extensions}
    assert theirs <= mine


def test_sgx_extensions_are_those_of_a_real_pck(tdx: SimulatedPlatform) -> None:
    if not SHARED.exists():
        pytest.skip("no ../shared/attestation")
    real = dcap_qvl.parse_quote((SHARED / "dcap" / "tdx_quote").read_bytes())
    ours = dcap_qvl.parse_quote(tdx.attester.quote(REPORT_DATA).quote)
    oid = "1.2.840.113741.1.13.1"
    for number in ("1", "2.1", "2.16", "2.17", "2.18", "3", "4", "5", "6", "7.1", "7.3"):
        found = [quote.pck_extension().get_value(f"{oid}.{number}") for quote in (real, ours)]
        assert len(found[0]) == len(found[1])


def test_report_data_have_one_length(tdx: SimulatedPlatform, snp: SimulatedPlatform) -> None:
    for platform in (tdx, snp):
        for size in (0, 63, 65):
            with pytest.raises(AttestationError, match="report data"):
                platform.attester.quote(bytes(size))


def test_the_root_says_what_it_is(tdx: SimulatedPlatform, snp: SimulatedPlatform) -> None:
    for platform in (tdx, snp):
        assert platform.simulated
        root = x509.load_pem_x509_certificate(platform.root.read_bytes())
        assert MARK in root.subject.rfc4514_string()


def test_other_code_has_another_measurement_and_another_sealing_key(tdx: SimulatedPlatform) -> None:
    other = SimulatedPlatform(tdx.root.parent, measurement=bytes(48))
    assert other.measurements()["mrtd"] == "00" * 48
    assert other.sealing_key() != tdx.sealing_key()
    assert len(other.sealing_key()) == 32
    verify_tdx(other.attester.quote(REPORT_DATA), root_der(tdx))
    with pytest.raises(UsageError, match="measurement"):
        SimulatedPlatform(tdx.root.parent, measurement=bytes(32))


def test_other_hardware_has_another_sealing_key(tdx: SimulatedPlatform, tmp_path: Path) -> None:
    assert SimulatedPlatform.create(tmp_path / "other").sealing_key() != tdx.sealing_key()


@pytest.mark.parametrize(
    "change",
    [
        lambda package: (package / "a.py").write_text("x = 2\n"),
        lambda package: (package / "a.py").rename(package / "b.py"),
        lambda package: (package / "sub" / "new.py").write_text(""),
        lambda package: (package / "sub" / "c.py").unlink(),
    ],
    ids=["changed", "renamed", "added", "removed"],
)
def test_the_measurement_is_that_of_the_source(tmp_path: Path, change: Callable[[Path], object]) -> None:
    (tmp_path / "sub" / "__pycache__").mkdir(parents=True)
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "sub" / "c.py").write_text("y = 1\n")
    before = measure_code(tmp_path)
    (tmp_path / "sub" / "__pycache__" / "c.pyc").write_text("compiled")
    assert measure_code(tmp_path) == before
    change(tmp_path)
    assert measure_code(tmp_path) != before


def test_a_package_without_source_has_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(AttestationError, match="no source files"):
        measure_code(tmp_path)


def test_what_stands_for_fuses_is_private_and_never_made_twice(tdx: SimulatedPlatform) -> None:
    directory = tdx.root.parent
    for name in ("hardware.key", "counter"):
        assert stat.S_IMODE((directory / name).stat().st_mode) == 0o600
    with pytest.raises(UsageError, match="there already"):
        SimulatedPlatform.create(directory)


def test_simulated_hardware_that_others_can_read_is_refused(tmp_path: Path) -> None:
    SimulatedPlatform.create(tmp_path / "tdx")
    os.chmod(tmp_path / "tdx" / "hardware.key", 0o644)
    with pytest.raises(UsageError, match="readable by others"):
        SimulatedPlatform(tmp_path / "tdx")


@pytest.mark.parametrize("cut", [0, 10, 200, -1, -40])
def test_damaged_hardware_is_refused_without_showing_a_key(tmp_path: Path, cut: int) -> None:
    SimulatedPlatform.create(tmp_path / "tdx")
    path = tmp_path / "tdx" / "hardware.key"
    data = path.read_bytes()
    path.write_bytes(data[:cut])
    with pytest.raises(FormatError) as caught:
        SimulatedPlatform(tmp_path / "tdx")
    fuse = json.loads(data)["fuse"]
    assert fuse not in str(caught.value)


def test_keys_that_are_none_are_refused(tmp_path: Path) -> None:
    SimulatedPlatform.create(tmp_path / "tdx")
    path = tmp_path / "tdx" / "hardware.key"
    good = path.read_bytes()
    path.write_bytes(good.replace(b"PRIVATE KEY", b"PUBLIC KEY"))
    with pytest.raises(FormatError, match="damaged"):
        SimulatedPlatform(tmp_path / "tdx")
    path.write_bytes(good.replace(b'"kind":"tdx"', b'"kind":"snp"'))
    with pytest.raises(FormatError, match="other keys"):
        SimulatedPlatform(tmp_path / "tdx")


def test_the_root_must_be_this_hardwares(tmp_path: Path) -> None:
    first, second = (SimulatedPlatform.create(tmp_path / name) for name in ("first", "second"))
    first.root.write_bytes(second.root.read_bytes())
    with pytest.raises(FormatError, match="other hardware"):
        SimulatedPlatform(tmp_path / "first")
    first.root.write_bytes(b"no certificate")
    with pytest.raises(FormatError, match="no certificate"):
        SimulatedPlatform(tmp_path / "first")


def test_the_counter_only_goes_up_and_survives(tmp_path: Path) -> None:
    platform = SimulatedPlatform.create(tmp_path / "tdx")
    assert platform.counter.read() == 0
    assert [platform.counter.increment() for _ in range(3)] == [1, 2, 3]
    assert SimulatedPlatform(tmp_path / "tdx").counter.read() == 3


@pytest.mark.parametrize("content", [b"", b"-1", b"1.5", "\u0661".encode(), b"9" * 21])
def test_a_counter_that_is_no_number_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "counter"
    path.touch(0o600)
    path.write_bytes(content)
    with pytest.raises((AttestationError, UsageError), match="counter"):
        FileCounter(path).increment()
    assert path.read_bytes() == content


def _count(path: Path, times: int) -> list[int]:
    return [FileCounter(path).increment() for _ in range(times)]


def test_processes_take_turns_at_the_counter(tmp_path: Path) -> None:
    path = tmp_path / "counter"
    path.touch(0o600)
    path.write_bytes(b"0")
    with multiprocessing.get_context("fork").Pool(2) as pool:
        counts = pool.starmap(_count, [(path, 20)] * 2)
    assert sorted(counts[0] + counts[1]) == list(range(1, 41))


def test_evidence_of_both_kinds_survives_its_encoding(tdx: SimulatedPlatform, snp: SimulatedPlatform) -> None:
    for platform in (tdx, snp):
        evidence = attest(platform.attester, {"nonce": "00"})
        assert Evidence.from_bytes(evidence.to_bytes()) == evidence


@pytest.mark.parametrize(("size", "header"), [(0, "0400"), (127, "047f"), (128, "048180"), (256, "04820100")])
def test_der_lengths(size: int, header: str) -> None:
    assert der(0x04, bytes(size)) == bytes.fromhex(header) + bytes(size)


def test_der_numbers_and_oids() -> None:
    assert [der_integer(number).hex() for number in (0, 127, 128, 255, 256)] == [
        *("020100", "02017f", "02020080", "020200ff", "02020100")
    ]
    # As in a real PCK certificate.
    assert der_pair("1.2.840.113741.1.13.1.3", der(0x04, bytes(2))).hex() == "3010060a2a864886f84d010d010304020000"
