"""The TPM's attester, sealing key and counter on a real swtpm that the tests start; skipped where it is missing."""

import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from obfuscatune.errors import AttestationError, RollbackError, SealError, UsageError
from obfuscatune.parties.attestation.evidence import Evidence, attest
from obfuscatune.parties.attestation.platform import Platform, open_platform
from obfuscatune.parties.attestation.policy import Policy
from obfuscatune.parties.attestation.verdict import Verdict
from obfuscatune.parties.attestation.verify import judge
from obfuscatune.parties.attestation.vtpm import PCRS
from obfuscatune.service.state import State

from .enclaves import NONCE, TLS_KEY, claims
from .samples import failed
from .swtpm import SoftwareTpm, new_tpm
from .test_tpm import ZERO, pin

COUNTER = "0x01808F01"


@pytest.fixture
def tpm(monkeypatch: pytest.MonkeyPatch) -> Iterator[SoftwareTpm]:
    """A new TPM, off, that the platform will find."""
    with new_tpm() as tpm:
        monkeypatch.setenv("TPM2TOOLS_TCTI", tpm.tcti)
        yield tpm


@pytest.fixture
def platform(tpm: SoftwareTpm) -> Iterator[Platform]:
    with tpm.running():
        yield open_platform("tpm")


def policy_for(evidence: Evidence) -> Policy:
    keys = frozenset({pin(evidence.quote.extras["key"])})
    measurements = {f"pcr{index}": frozenset({ZERO}) for index in PCRS}
    return Policy(("tpm",), allow_simulation=True, simulation_tpm_keys=keys, measurements=measurements)


def judged(platform: Platform, policy: Policy) -> Verdict:
    return judge(attest(platform.attester, claims().to_dict()), policy, nonce=NONCE, tls_key=TLS_KEY)


def test_quotes_are_accepted_until_a_pcr_changes(platform: Platform, tpm: SoftwareTpm) -> None:
    assert platform.simulated
    policy = policy_for(attest(platform.attester, claims().to_dict()))
    for _ in range(5):  # more than a TPM has room for, were anything left in it
        verdict = judged(platform, policy)
        assert verdict.accepted, str(verdict)
        assert verdict.simulation
    tpm.extend(14)
    refused = judged(platform, policy)
    assert failed(refused) == ["pcr14"]
    assert refused.measurements == platform.measurements()


def test_nonce_and_key_of_another_are_refused(platform: Platform) -> None:
    evidence = attest(platform.attester, claims().to_dict())
    policy = policy_for(evidence)
    assert failed(judge(evidence, policy, nonce="cd" * 32, tls_key=TLS_KEY)) == ["nonce"]
    with new_tpm() as other, pytest.MonkeyPatch.context() as patch, other.running():
        patch.setenv("TPM2TOOLS_TCTI", other.tcti)
        foreign = judged(open_platform("tpm"), policy)
    assert failed(foreign)[0] == "key"


def test_the_key_stays_in_the_tpm(tpm: SoftwareTpm) -> None:
    keys, sealing = set(), set()
    for _ in range(2):
        with tpm.running():
            platform = open_platform("tpm")
            keys.add(platform.attester.quote(bytes(64)).extras["key"])
            sealing.add(platform.sealing_key())
            assert not tpm.run("tpm2_getcap", "handles-transient").strip()
            assert not tpm.run("tpm2_getcap", "handles-loaded-session").strip()
    assert len(keys) == len(sealing) == 1


def test_the_sealing_key_is_of_this_tpm_and_these_pcrs(platform: Platform, tpm: SoftwareTpm, tmp_path: Path) -> None:
    key = platform.sealing_key()
    assert key == platform.sealing_key()
    assert len(key or b"") == 32
    for pcr in (9, 15):  # one of each half of the policy
        tpm.extend(pcr)
        assert platform.sealing_key() != key
    with new_tpm() as other, pytest.MonkeyPatch.context() as patch, other.running():
        patch.setenv("TPM2TOOLS_TCTI", other.tcti)
        assert open_platform("tpm").sealing_key() != key


def test_the_old_key_refuses_to_work_under_other_pcrs(tpm: SoftwareTpm, tmp_path: Path) -> None:
    """Whoever has the TPM can name the good system's policy, and make its key, but not use it."""
    attributes = "fixedtpm|fixedparent|sensitivedataorigin|sign|noda"
    halves = ["sha256:0,1,2,3,4,5,6,7", "sha256:8,9,11,12,13,14,15"]
    session, policy, key, label = (str(tmp_path / name) for name in ("session", "policy", "key", "label"))
    Path(label).write_bytes(b"obfuscatune sealing key 1")

    def name_pcrs(*kind: str) -> None:
        tpm.run("tpm2_startauthsession", "-Q", "-S", session, *kind)
        tpm.run("tpm2_policypcr", "-Q", "-S", session, "-l", halves[0])
        tpm.run("tpm2_policypcr", "-Q", "-S", session, "-l", halves[1], "-L", policy if not kind else session + ".2")

    def use(*authorization: str) -> bytes:
        make = ("tpm2_createprimary", "-Q", "-C", "o", "-g", "sha256", "-G", "hmac", "-L", policy, "-a", attributes)
        tpm.run(*make, "-c", key)
        tpm.run("tpm2_flushcontext", "-t")
        try:
            return tpm.run("tpm2_hmac", "-c", key, *authorization, label)
        finally:
            tpm.run("tpm2_flushcontext", "-t")
            tpm.run("tpm2_flushcontext", "-l")

    with tpm.running():
        name_pcrs()
        tpm.run("tpm2_flushcontext", "-l")
        name_pcrs("--policy-session")
        assert use("-p", f"session:{session}") == open_platform("tpm").sealing_key()  # the control
        with pytest.raises(subprocess.CalledProcessError):  # without the policy
            use()
        tpm.extend(14)
        name_pcrs("--policy-session")
        with pytest.raises(subprocess.CalledProcessError) as refused:
            use("-p", f"session:{session}")
    assert b"a policy check failed" in refused.value.stderr


def test_the_counter_survives_restarts_and_deletion(tpm: SoftwareTpm) -> None:
    seen = []
    for _ in range(2):
        with tpm.running():
            counter = open_platform("tpm").counter
            assert counter is not None
            seen += [counter.read(), counter.increment()]
            assert counter.read() == seen[-1]
    with tpm.running():
        tpm.run("tpm2_nvundefine", "-Q", "-C", "o", COUNTER)
        counter = open_platform("tpm").counter
        assert counter is not None
        seen.append(counter.read())
    first = seen[0]
    assert seen == [first, first + 1, first + 1, first + 2, first + 3]


def test_memory_in_the_counters_place_is_refused(platform: Platform, tpm: SoftwareTpm) -> None:
    tpm.run("tpm2_nvdefine", "-Q", "-C", "o", "-s", "8", "-a", "ownerread|ownerwrite", COUNTER)
    assert platform.counter is not None
    for use in (platform.counter.read, platform.counter.increment):
        with pytest.raises(AttestationError, match="not a counter in the TPM"):
            use()


def test_threads_take_turns(platform: Platform) -> None:
    results: list[object] = []

    def work() -> None:
        results.append(platform.sealing_key())
        results.append(platform.attester.quote(bytes(64)).kind)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert set(results) == {"tpm", platform.sealing_key()}


def test_report_data_of_another_length_is_refused(platform: Platform) -> None:
    with pytest.raises(AttestationError, match="report data"):
        platform.attester.quote(bytes(63))


def test_no_tpm_is_a_clear_error(tpm: SoftwareTpm) -> None:
    with pytest.raises(AttestationError, match="TPM2TOOLS_TCTI"):  # it is off
        open_platform("tpm")


def test_no_tpm2_tools_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AttestationError, match="install tpm2-tools"):
        open_platform("tpm")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("yes", "tpm2_getcap"),  # more output than is taken
        ("echo 'ERROR: Esys_X(0x902) - secret words' >&2; exit 1", "TPM error 0x902"),
        ("exec sleep 600", "tpm2_getcap"),  # longer than is waited
    ],
)
def test_a_program_that_misbehaves_is_ended(
    script: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "tpm2_getcap"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr("obfuscatune.parties.attestation.tpm2_tools._SECONDS", 0.5)
    with pytest.raises(AttestationError, match=message) as caught:
        open_platform("tpm")
    assert "secret" not in str(caught.value)


def test_an_enclaves_state_on_a_tpm(tpm: SoftwareTpm, tmp_path: Path) -> None:
    """Sealed to the TPM and its PCRs, counted by it: it opens after a restart, and not after another boot."""
    with tpm.running():
        assert not open_platform("tpm").counter.used()
        with State.open(tmp_path, open_platform("tpm")) as state:
            identity = state.identity.public
        assert open_platform("tpm").counter.used()
        with pytest.raises(UsageError, match="state is missing"):
            State.open(tmp_path / "not mounted", open_platform("tpm"))
        older = (tmp_path / "state.sealed").read_bytes()
    with tpm.running():
        with State.open(tmp_path, open_platform("tpm")) as state:
            assert state.identity.public == identity
        newer = (tmp_path / "state.sealed").read_bytes()
        (tmp_path / "state.sealed").write_bytes(older)
        with pytest.raises(RollbackError, match="older"):
            State.open(tmp_path, open_platform("tpm"))
        (tmp_path / "state.sealed").write_bytes(newer)
        tpm.extend(14)
        with pytest.raises(SealError, match="does not open"):
            State.open(tmp_path, open_platform("tpm"))
