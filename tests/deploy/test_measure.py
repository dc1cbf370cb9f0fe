"""Measurements computed from what was built: SIGSTRUCTs made here, the SNP digest of a real firmware."""

import hashlib
import os
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from obfuscatune.errors import FormatError, UsageError
from obfuscatune.parties.attestation.policy import Policy

Scripts = dict[str, ModuleType]
MRENCLAVE = bytes(range(32))
KEY = rsa.generate_private_key(public_exponent=3, key_size=3072)


@pytest.fixture
def measure(scripts: Scripts) -> ModuleType:
    return scripts["measure"]


def sigstruct(*, debug: bool = False) -> bytes:
    """A SIGSTRUCT as gramine-sgx-sign writes it, from the SDM's table and not from the reader."""
    data = bytearray(1808)
    data[0:16] = bytes.fromhex("06000000e10000000000010000000000")
    data[24:40] = bytes.fromhex("01010000600000006000000001000000")
    data[512:516] = (3).to_bytes(4, "little")
    data[928:936] = (0x4 | (0x2 if debug else 0)).to_bytes(8, "little")
    data[960:992] = MRENCLAVE
    data[1024:1028] = b"\x07\x00\x01\x00"
    data[128:512] = KEY.public_key().public_numbers().n.to_bytes(384, "little")
    signature = KEY.sign(bytes(data[:128] + data[900:1028]), padding.PKCS1v15(), SHA256())
    data[516:900] = signature[::-1]
    return bytes(data)


GOOD = sigstruct()


def test_a_sigstruct_gives_its_measurements(measure: ModuleType) -> None:
    found = measure.read_sigstruct(GOOD, "it")
    assert found.mrenclave == MRENCLAVE.hex()
    assert found.mrsigner == hashlib.sha256(GOOD[128:512]).hexdigest()
    assert (found.debug, found.product, found.version) == (False, 7, 1)


def test_the_table_is_toml_for_a_policy(
    measure: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "obfuscatune.sig"
    path.write_bytes(GOOD)
    assert measure.main(["sgx", str(path)]) == 0
    text = capsys.readouterr().out
    assert tomllib.loads(text) == {"measurements": {"mrenclave": [MRENCLAVE.hex()]}}
    policy = tmp_path / "policy.toml"
    policy.write_text(f'[platform]\nkinds = ["sgx"]\n{text}')
    assert Policy.load(policy).measurements == {"mrenclave": frozenset({MRENCLAVE.hex()})}
    signer = "\n".join(line.removeprefix("# ") for line in text.splitlines() if "=" in line and "mrenclave" not in line)
    policy.write_text(f'[platform]\nkinds = ["sgx"]\n[measurements]\n{signer}\n')
    assert Policy.load(policy).isv_svn == 1


def test_a_debug_enclave_has_no_table(measure: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "obfuscatune.sig"
    path.write_bytes(sigstruct(debug=True))
    assert measure.main(["sgx", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "debug enclave" in captured.err


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(offset=st.integers(0, 1039), bit=st.integers(0, 7))
def test_a_changed_bit_is_refused_where_it_is_signed(measure: ModuleType, offset: int, bit: int) -> None:
    data = bytearray(GOOD)
    data[offset] ^= 1 << bit
    if offset >= 1028:  # reserved, neither signed nor read
        measure.read_sigstruct(bytes(data), "it")
        return
    with pytest.raises(FormatError):
        measure.read_sigstruct(bytes(data), "it")


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=2000) | st.binary(min_size=1808, max_size=1808).map(lambda tail: GOOD[:900] + tail[900:])
)
def test_other_bytes_are_refused(measure: ModuleType, data: bytes) -> None:
    with pytest.raises(FormatError):
        measure.read_sigstruct(data, "it")


def test_a_missing_package_is_named_with_its_place(measure: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sevsnpmeasure.guest", None)
    given = {"vcpus": 1, "vcpu_type": "EPYC-v4", "kernel": None, "initrd": None, "append": "", "features": 1}
    with pytest.raises(UsageError, match=r"'\.\[measure\]' in the source"):
        measure.snp_launch_digest(Path("OVMF.fd"), **given)


def test_the_launch_digest_of_a_real_firmware(
    measure: ModuleType, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sevsnpmeasure", reason="sev-snp-measure is not installed (extra: measure)")
    firmware = shared / "attestation" / "snp" / "ovmf_AmdSev_suffix.bin"
    if not firmware.exists():
        pytest.skip("there is no firmware image in the folder 'shared'")
    words = ["snp", "--firmware", str(firmware), "--vcpus", "1", "--vcpu-type", "EPYC-v4"]
    (tmp_path / "kernel").write_bytes(b"")
    (tmp_path / "append").write_text("roothash=00")
    assert measure.main([*words, "--kernel", str(tmp_path / "kernel")]) == 0
    (digest,) = tomllib.loads(capsys.readouterr().out)["measurements"]["measurement"]
    assert len(digest) == 96
    assert digest.startswith("ddc52245")
    assert digest.endswith("19b5")
    # What else is measured moves it: one more processor, a command line.
    for more in (["--vcpus", "2"], ["--append-file", str(tmp_path / "append")]):
        assert measure.main([*words, "--kernel", str(tmp_path / "kernel"), *more]) == 0
        assert digest not in capsys.readouterr().out


def test_a_file_that_is_no_firmware_is_refused(measure: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("sevsnpmeasure", reason="sev-snp-measure is not installed (extra: measure)")
    path = tmp_path / "firmware"
    path.write_bytes(os.urandom(4096))
    arguments = {"vcpus": 1, "kernel": None, "initrd": None, "append": "", "features": 1}
    with pytest.raises(UsageError, match="no launch digest"):
        measure.snp_launch_digest(path, vcpu_type="EPYC-v4", **arguments)
    with pytest.raises(UsageError, match="unknown type of processor"):
        measure.snp_launch_digest(path, vcpu_type="486", **arguments)
    with pytest.raises(UsageError, match="no such file"):
        measure.snp_launch_digest(tmp_path / "none", vcpu_type="EPYC-v4", **arguments)
