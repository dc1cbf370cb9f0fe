"""Specifications of platforms, and each simulated one judged end to end."""

import hashlib
import time
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from obfuscatune.errors import AttestationError, UsageError
from obfuscatune.parties.attestation.claims import EnclaveClaims
from obfuscatune.parties.attestation.evidence import Evidence, attest
from obfuscatune.parties.attestation.platform import open_platform
from obfuscatune.parties.attestation.policy import Policy
from obfuscatune.parties.attestation.simulated_pki import Flaws
from obfuscatune.parties.attestation.simulator import SimulatedPlatform
from obfuscatune.parties.attestation.verdict import Verdict
from obfuscatune.parties.attestation.verify import judge
from obfuscatune.parties.identity import Identity

NONCE = "5a" * 32
TLS_KEY = hashlib.sha256(b"key").hexdigest()


@pytest.fixture(scope="session", params=["tdx", "snp"])
def platform(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimulatedPlatform:
    return SimulatedPlatform.create(tmp_path_factory.mktemp("platforms") / request.param, request.param)


@pytest.fixture
def policy(platform: SimulatedPlatform) -> Policy:
    """Accepts this platform running this code, and nothing else."""
    pins = "".join(f'{name} = ["{value}"]\n' for name, value in platform.measurements().items())
    tcb = "[platform.min_tcb]\nbootloader = 4\ntee = 0\nsnp = 10\nmicrocode = 200\n" if platform.kind == "snp" else ""
    path = platform.root.with_name("policy.toml")
    path.write_text(
        f'[platform]\nkinds = ["{platform.kind}"]\n{tcb}[measurements]\n{pins}'
        f'[simulation]\nallow = true\nroot = "{platform.root.name}"\n'
    )
    return Policy.load(path)


def evidence_of(platform: SimulatedPlatform) -> Evidence:
    identity = Identity.generate("enclave", "x25519").public
    claims = EnclaveClaims(identity, TLS_KEY, NONCE, int(time.time()), "1")
    return Evidence.from_bytes(attest(platform.attester, claims.to_dict()).to_bytes())


def judged(platform: SimulatedPlatform, policy: Policy) -> Verdict:
    return judge(evidence_of(platform), policy, nonce=NONCE, tls_key=TLS_KEY)


def failed(verdict: Verdict) -> set[str]:
    return {rule.name for rule in verdict.rules if not rule.passed}


def test_a_simulated_platform_is_accepted_by_a_policy_that_names_it(
    platform: SimulatedPlatform, policy: Policy
) -> None:
    verdict = judged(platform, policy)
    assert verdict.accepted, str(verdict)
    assert verdict.simulation


@pytest.mark.parametrize("flaw", ["debug", "outdated_tcb", "expired_collateral"])
def test_a_flawed_platform_is_refused(platform: SimulatedPlatform, policy: Policy, flaw: str) -> None:
    verdict = judged(SimulatedPlatform(platform.root.parent, flaws=Flaws(**{flaw: True})), policy)
    assert not verdict.accepted
    expected = {
        "debug": {"debug"},
        "outdated_tcb": {"tcb status", "advisories", "tcb", "launch tcb", "committed tcb"},
        "expired_collateral": {"signature", "collateral", "certificates"},
    }
    assert failed(verdict) & expected[flaw], str(verdict)


def test_other_code_is_refused(platform: SimulatedPlatform, policy: Policy) -> None:
    verdict = judged(SimulatedPlatform(platform.root.parent, measurement=bytes(48)), policy)
    assert not verdict.accepted
    assert any({"mrtd", "measurement"} & set(name.split()) for name in failed(verdict)), str(verdict)


def test_a_simulation_is_refused_where_the_policy_names_another_or_none(
    platform: SimulatedPlatform, policy: Policy, tmp_path: Path
) -> None:
    other = SimulatedPlatform.create(tmp_path / "other")
    root = x509.load_pem_x509_certificate(other.root.read_bytes()).public_bytes(Encoding.DER)
    none = replace(policy, allow_simulation=False, simulation_roots=())
    for refusing in (replace(policy, simulation_roots=(root,)), none):
        assert not judged(platform, refusing).accepted


def test_simulated_hardware_is_made_once(tmp_path: Path) -> None:
    specification = f"simulation:{tmp_path / 'hardware'}"
    first, second = open_platform(specification), open_platform(specification)
    assert first.simulated
    assert first.sealing_key() == second.sealing_key()
    assert first.counter is not None
    assert second.counter is not None
    assert (first.counter.increment(), second.counter.increment()) == (1, 2)


def test_hardware_of_one_kind_is_not_of_the_other(platform: SimulatedPlatform) -> None:
    kinds = {"tdx": "simulation", "snp": "simulation-snp"}
    right = kinds.pop(platform.kind)
    (wrong,) = kinds.values()
    assert open_platform(f"{right}:{platform.root.parent}").name == platform.name
    with pytest.raises(UsageError, match="another kind"):
        open_platform(f"{wrong}:{platform.root.parent}")


@pytest.mark.parametrize(
    "specification", ["", "simulation", "simulation:", "simulation-snp:", "configfs:x", "gramine:/tmp", "Simulation:x"]
)
def test_other_specifications_are_refused(specification: str) -> None:
    with pytest.raises(UsageError, match="platform"):
        open_platform(specification)


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot make simulated hardware"):
        open_platform(f"simulation:{tmp_path / 'file' / 'below'}")


def test_no_machine_becomes_a_platform_by_itself() -> None:
    """On a machine without the hardware the real ones fail; none of them falls back to a simulation."""
    if Path("/dev/attestation").exists() or Path("/sys/kernel/config/tsm/report").exists():
        pytest.skip("this machine has the hardware")
    with pytest.raises(AttestationError, match="Gramine"):
        open_platform("gramine")
    with pytest.raises(AttestationError, match="configfs-tsm"):
        open_platform("configfs").measurements()
