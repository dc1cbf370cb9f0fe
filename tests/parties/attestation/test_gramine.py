"""Gramine's pseudo-files, laid out as real ones."""

from pathlib import Path

import pytest

from obfuscatune.errors import AttestationError
from obfuscatune.parties.attestation.evidence import MAX_QUOTE_BYTES
from obfuscatune.parties.attestation.gramine import GraminePlatform

SHARED = Path(__file__).parents[3] / ".." / "shared" / "attestation"
REPORT_DATA = bytes(range(64))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "keys").mkdir()
    (tmp_path / "attestation_type").write_text("dcap")
    (tmp_path / "user_report_data").write_bytes(bytes(64))
    (tmp_path / "quote").write_bytes(b"\3".ljust(48 + 320, b"\0") + REPORT_DATA + bytes(100))
    (tmp_path / "keys" / "_sgx_mrenclave").write_bytes(bytes(range(16)))
    return tmp_path


def test_a_quote(root: Path) -> None:
    quote = GraminePlatform(root).attester.quote(REPORT_DATA)
    assert (quote.kind, quote.quote, quote.extras) == ("sgx", (root / "quote").read_bytes(), {})
    assert (root / "user_report_data").read_bytes() == REPORT_DATA


def test_a_quote_over_other_data_is_refused(root: Path) -> None:
    with pytest.raises(AttestationError, match="other report data"):
        GraminePlatform(root).attester.quote(bytes(64))


@pytest.mark.parametrize("size", [0, 48 + 383, MAX_QUOTE_BYTES + 1])
def test_a_quote_of_an_impossible_length_is_refused(root: Path, size: int) -> None:
    whole = (root / "quote").read_bytes()
    (root / "quote").write_bytes(whole.ljust(size, b"\0")[:size])
    with pytest.raises(AttestationError, match=r"length|too long|cut|not a DCAP quote"):
        GraminePlatform(root).attester.quote(REPORT_DATA)


def test_report_data_have_one_length(root: Path) -> None:
    with pytest.raises(AttestationError, match="report data"):
        GraminePlatform(root).attester.quote(bytes(65))
    assert (root / "user_report_data").read_bytes() == bytes(64)


@pytest.mark.parametrize("name", ["user_report_data", "quote"])
def test_a_missing_file_is_named_and_not_made(root: Path, name: str) -> None:
    (root / name).unlink()
    with pytest.raises(AttestationError, match=name):
        GraminePlatform(root).attester.quote(REPORT_DATA)
    assert not (root / name).exists()


@pytest.mark.parametrize("kind", ["none", "epid", "", "x" * 1000])
def test_a_manifest_without_dcap_is_refused(root: Path, kind: str) -> None:
    (root / "attestation_type").write_text(kind)
    with pytest.raises(AttestationError, match="attestation type"):
        GraminePlatform(root)


def test_outside_of_gramine_there_is_no_platform(tmp_path: Path) -> None:
    with pytest.raises(AttestationError, match="attestation type"):
        GraminePlatform(tmp_path)


def test_the_sealing_key_is_the_processors_and_not_its_own_bytes(root: Path) -> None:
    platform = GraminePlatform(root)
    first = platform.sealing_key()
    assert first == GraminePlatform(root).sealing_key()
    assert len(first) == 32
    assert bytes(range(16)) not in first
    (root / "keys" / "_sgx_mrenclave").write_bytes(bytes(range(1, 17)))
    assert platform.sealing_key() != first
    assert (platform.simulated, platform.counter) == (False, None)


@pytest.mark.parametrize("key", [b"", bytes(16), b"k" * 15, b"k" * 17])
def test_a_key_that_is_none_is_refused_without_showing_it(root: Path, key: bytes) -> None:
    (root / "keys" / "_sgx_mrenclave").write_bytes(key)
    with pytest.raises(AttestationError, match="sealing key") as caught:
        GraminePlatform(root).sealing_key()
    assert "kkk" not in str(caught.value)


def test_measurements_of_a_real_quote(root: Path) -> None:
    dcap_qvl = pytest.importorskip("dcap_qvl")
    path = SHARED / "dcap" / "sgx_quote"
    if not path.exists():
        pytest.skip("no ../shared/attestation")
    raw = path.read_bytes()
    (root / "quote").write_bytes(raw[:368] + bytes(64) + raw[432:])  # over the data that are asked for
    report = dcap_qvl.parse_quote(raw).report
    assert GraminePlatform(root).measurements() == {
        "mrenclave": report.mr_enclave.hex(),
        "mrsigner": report.mr_signer.hex(),
    }
