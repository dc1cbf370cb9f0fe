"""``obfuscatune log check``: the verdict and the exit code, for a copy as a party has it."""

from pathlib import Path

import pytest

from obfuscatune.parties.canonical import encode
from obfuscatune.parties.identity import Identity
from obfuscatune.service.entries import NO_ENTRIES
from obfuscatune.service.log import AuditLog, join_copy

from .conftest import Run

ENCLAVE = Identity.generate("enclave")


@pytest.fixture
def log(tmp_path: Path) -> AuditLog:
    log = AuditLog.open(tmp_path / "log", NO_ENTRIES, 0)
    log.append("started", profile="balanced")
    log.append("step", job="ab" * 32, party="cd" * 32, step=7)
    return log


@pytest.fixture
def public(tmp_path: Path) -> Path:
    return write(tmp_path / "enclave.pub", encode(ENCLAVE.public.to_dict()) + b"\n")


def copy(log: AuditLog, path: Path, signer: Identity = ENCLAVE) -> Path:
    return write(path, join_copy(log.lines(0), log.signed_head(signer)))


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_a_whole_log_is_printed_with_what_was_checked(log: AuditLog, public: Path, tmp_path: Path, run: Run) -> None:
    monday = copy(log, tmp_path / "monday.log")
    log.append("stopped")
    tuesday = copy(log, tmp_path / "tuesday.log")
    outcome = run("log", "check", tuesday, "--earlier", monday, "--enclave", public)
    assert outcome.code == 0, outcome.err
    for text in ("started", "step=7", "profile=balanced", "abababab", "stopped", "3 entries", "1 new"):
        assert text in outcome.out
    assert ENCLAVE.public.fingerprint in outcome.out and "not checked" not in outcome.out


def test_what_was_not_checked_is_said(log: AuditLog, tmp_path: Path, run: Run) -> None:
    outcome = run("log", "check", copy(log, tmp_path / "copy"))
    assert outcome.code == 0
    assert "give --enclave" in outcome.out and "give --earlier" in outcome.out


def test_a_broken_log_exits_with_1(log: AuditLog, public: Path, tmp_path: Path, run: Run) -> None:
    path = copy(log, tmp_path / "copy")
    good = path.read_bytes()
    for bad in (good.replace(b"balanced", b"naive"), good[:-5], good + b"{}\n", b"", b"{}\n", b"no log at all\n" * 9):
        outcome = run("log", "check", write(path, bad), "--enclave", public)
        assert outcome.code == 1 and outcome.out == "" and "BROKEN" in outcome.err and "Traceback" not in outcome.err


def test_the_log_of_another_enclave_exits_with_1(log: AuditLog, tmp_path: Path, run: Run) -> None:
    other = write(tmp_path / "other.pub", encode(Identity.generate("enclave").public.to_dict()))
    outcome = run("log", "check", copy(log, tmp_path / "copy"), "--enclave", other)
    assert outcome.code == 1 and "not signed by this enclave" in outcome.err


def test_a_fork_exits_with_1(log: AuditLog, public: Path, tmp_path: Path, run: Run) -> None:
    head, length = log.head, log.length
    log.append("used-up")
    monday = copy(log, tmp_path / "monday.log")
    log.close()
    log = AuditLog.open(tmp_path / "log", head, length)
    log.append("started")
    tuesday = copy(log, tmp_path / "tuesday.log")
    outcome = run("log", "check", tuesday, "--earlier", monday, "--enclave", public)
    assert outcome.code == 1 and "differs from your earlier copy" in outcome.err and "entry 2" in outcome.err
    assert run("log", "check", tuesday, "--enclave", public).code == 0


def test_after_a_hand_over_the_earlier_copy_is_signed_by_the_enclave_before(
    log: AuditLog, public: Path, tmp_path: Path, run: Run
) -> None:
    monday = copy(log, tmp_path / "monday.log", Identity.generate("enclave"))
    log.append("handed-over", to=ENCLAVE.public.fingerprint)
    tuesday = copy(log, tmp_path / "tuesday.log")
    outcome = run("log", "check", tuesday, "--earlier", monday, "--enclave", public)
    assert outcome.code == 0, outcome.err
    assert "1 new" in outcome.out
    write(monday, monday.read_bytes()[:-5])  # no whole copy says less than it seems to
    outcome = run("log", "check", tuesday, "--earlier", monday, "--enclave", public)
    assert outcome.code == 1 and f"BROKEN: {monday}" in outcome.err


def test_misuse_exits_with_2(log: AuditLog, tmp_path: Path, run: Run) -> None:
    path = copy(log, tmp_path / "copy")
    assert run("log", "check", tmp_path / "missing").code == 2
    assert run("log", "check", path, "--enclave", path).code == 2
    assert run("log", "check", path, "--earlier", tmp_path / "missing").code == 2


def test_an_enclave_is_also_known_by_its_evidence(log: AuditLog, tmp_path: Path, run: Run) -> None:
    claims = pytest.importorskip("obfuscatune.parties.attestation.claims")
    from obfuscatune.parties.attestation.evidence import Evidence, Quote

    made = claims.EnclaveClaims(identity=ENCLAVE.public, tls_key="ab" * 32, nonce="", issued=1, version="0")
    evidence = write(tmp_path / "evidence", Evidence(Quote("tdx", b"quote"), made.to_dict()).to_bytes())
    outcome = run("log", "check", copy(log, tmp_path / "copy"), "--enclave", evidence)
    assert outcome.code == 0, outcome.err
    assert ENCLAVE.public.fingerprint in outcome.out
