"""The judgement of whole evidence, on simulated platforms: accepted, and each rule that can fail, failing."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from obfuscatune.errors import AttestationError
from obfuscatune.parties.attestation.claims import EnclaveClaims
from obfuscatune.parties.attestation.evidence import Evidence, Quote
from obfuscatune.parties.attestation.simulated_pki import Flaws
from obfuscatune.parties.attestation.simulator import SimulatedPlatform
from obfuscatune.parties.attestation.verdict import Rule, Verdict
from obfuscatune.parties.attestation.verify import judge, judge_quote

from .enclaves import ENCLAVE, NONCE, TLS_KEY, claims, evidence, policy
from .samples import failed, rules


@pytest.fixture(params=["tdx", "snp"])
def platform(request: pytest.FixtureRequest) -> SimulatedPlatform:
    return request.getfixturevalue(f"simulated_{request.param}")


def test_evidence_of_the_simulator_is_accepted_where_it_is_allowed(platform: SimulatedPlatform) -> None:
    verdict = judge(evidence(platform), policy(platform), nonce=NONCE, tls_key=TLS_KEY)
    assert verdict.accepted, str(verdict)
    assert verdict.simulation
    assert verdict.require().identity == ENCLAVE.public
    assert verdict.measurements.items() >= platform.measurements().items()
    assert all(rules(verdict).values())
    assert str(verdict).endswith("accepted; SIMULATION, it protects nothing")
    assert json.loads(json.dumps(verdict.to_dict()))["accepted"] is True


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"allow_simulation": False}, "root"),
        ({"simulation_roots": ()}, "root"),
        ({"kinds": ("sgx",)}, "kind"),
        ({"measurements": {"mrtd": frozenset({"00" * 48}), "measurement": frozenset({"00" * 48})}}, "code"),
        ({"measurements": {}}, "measurements"),
        ({"max_age_seconds": 0}, "age"),
    ],
)
def test_a_stricter_policy_refuses(platform: SimulatedPlatform, changes: dict, rule: str) -> None:
    names = {"root": {"tdx": "signature", "snp": "certificates"}, "code": {"tdx": "mrtd", "snp": "measurement"}}
    stricter = dataclasses.replace(policy(platform), **changes)
    verdict = judge(evidence(platform, issued=int(time.time()) - 30), stricter, nonce=NONCE, tls_key=TLS_KEY)
    name = names.get(rule, {}).get(platform.kind, rule)
    assert failed(verdict)[0] == name
    assert not verdict.accepted
    with pytest.raises(AttestationError, match=f"rule '{name}'"):
        verdict.require()


def test_any_measurement_is_for_simulation_only(platform: SimulatedPlatform) -> None:
    lax = policy(platform, measurements={}, any_measurement=True)
    verdict = judge(evidence(platform), lax, nonce=NONCE, tls_key=TLS_KEY)
    assert verdict.accepted and rules(verdict)["measurements"] is None


@pytest.mark.parametrize(
    ("flaws", "names"),
    [
        (Flaws(debug=True), {"tdx": "debug", "snp": "debug"}),
        (Flaws(outdated_tcb=True), {"tdx": "tcb status", "snp": "tcb"}),
        (Flaws(expired_collateral=True), {"tdx": "collateral", "snp": "certificates"}),
    ],
)
def test_a_flawed_platform_is_refused(platform: SimulatedPlatform, flaws: Flaws, names: dict) -> None:
    flawed = SimulatedPlatform(platform.root.parent, flaws=flaws)
    verdict = judge(evidence(flawed), policy(platform), nonce=NONCE, tls_key=TLS_KEY)
    assert failed(verdict)[0] == names[platform.kind]


def test_other_code_is_refused(platform: SimulatedPlatform) -> None:
    other = SimulatedPlatform(platform.root.parent, measurement=bytes(48))
    verdict = judge(evidence(other), policy(platform), nonce=NONCE, tls_key=TLS_KEY)
    assert failed(verdict) == ["mrtd" if platform.kind == "tdx" else "measurement"]


def test_another_simulator_is_refused(platform: SimulatedPlatform, tmp_path: Path) -> None:
    other = SimulatedPlatform.create(tmp_path / "other", "tdx")
    trusting = policy(platform, kinds=("tdx", "snp"))
    assert not judge(evidence(other), trusting, nonce=NONCE, tls_key=TLS_KEY).accepted


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("issued", 0),
        ("tls_key", "00" * 32),
        ("nonce", ""),
        ("version", "9"),
        ("identity", None),
        ("format", "another"),
        ("more", 1),
    ],
)
def test_changed_claims_are_refused(platform: SimulatedPlatform, name: str, value: object) -> None:
    genuine = evidence(platform)
    verdict = judge(Evidence(genuine.quote, {**genuine.claims, name: value}), policy(platform))
    assert failed(verdict) == ["claims"]
    assert verdict.claims is None


@pytest.mark.parametrize(("bad", "name"), [({1: 2}, "key"), ({"format": object()}, "value"), ({}, "nothing")])
def test_claims_of_any_kind_are_a_verdict(simulated_tdx, bad: dict, name: str) -> None:
    assert failed(judge(Evidence(evidence(simulated_tdx).quote, bad), policy(simulated_tdx))) == ["claims"]


@pytest.mark.parametrize(
    ("asked", "rule"),
    [
        ({"nonce": "00" * 32}, "nonce"),
        ({"nonce": ""}, "nonce"),
        ({"nonce": "nönce"}, "nonce"),
        ({"tls_key": "00" * 32}, "tls key"),
        ({"now": time.time() + 3600}, "age"),
        ({"now": time.time() - 600}, "age"),
    ],
)
def test_what_the_verifier_asks_for_must_be_there(simulated_tdx, asked: dict, rule: str) -> None:
    verdict = judge(evidence(simulated_tdx), policy(simulated_tdx), **{"nonce": NONCE, "tls_key": TLS_KEY, **asked})
    assert failed(verdict) == [rule]


def test_a_clock_that_is_ahead_is_told_as_such(simulated_tdx) -> None:
    now = time.time()
    verdict = judge(evidence(simulated_tdx), policy(simulated_tdx), now=now - 600)
    told = next(rule for rule in verdict.rules if rule.name == "age")
    assert told.got.endswith(" s ahead") and not told.got.startswith("-")
    assert told.expected == "at most 600 s, and at most 60 s ahead of this machine's clock"


def test_what_is_not_asked_for_is_said_not_to_be_judged(simulated_tdx) -> None:
    verdict = judge(evidence(simulated_tdx), policy(simulated_tdx))
    assert verdict.accepted
    assert (rules(verdict)["nonce"], rules(verdict)["tls key"]) == (None, None)


def test_evidence_without_a_nonce_where_none_must_be(simulated_tdx) -> None:
    assert judge(evidence(simulated_tdx, nonce=""), policy(simulated_tdx), nonce="").accepted


def test_the_policys_collateral_wins(simulated_tdx) -> None:
    genuine = evidence(simulated_tdx)
    collateral = genuine.quote.extras["collateral"]
    assert not judge(genuine, policy(simulated_tdx, collateral="{}")).accepted
    bare = Evidence(Quote("tdx", genuine.quote.quote, {"collateral": b"{}"}), genuine.claims)
    assert not judge(bare, policy(simulated_tdx)).accepted
    assert judge(bare, policy(simulated_tdx, collateral=collateral.decode())).accepted
    none = Evidence(Quote("tdx", genuine.quote.quote), genuine.claims)
    assert failed(judge(none, policy(simulated_tdx)))[0] == "collateral"


def test_a_bare_quote_is_never_accepted(platform: SimulatedPlatform) -> None:
    for judged in (policy(platform), policy(platform, measurements={})):
        verdict = judge_quote(evidence(platform).quote, judged)
        assert not verdict.failed and not verdict.accepted
        assert rules(verdict)["claims"] is None
        with pytest.raises(AttestationError, match="without claims"):
            verdict.require()


@pytest.mark.parametrize("raised", [True, False, None])
def test_a_verdict_is_what_its_rules_are(raised: bool | None) -> None:
    made: Callable[..., Verdict] = lambda held: Verdict((Rule("age", raised, "x", "y"),), held)  # noqa: E731
    held: EnclaveClaims = claims()
    assert made(held).accepted is (raised is not False)
    assert not made(None).accepted
