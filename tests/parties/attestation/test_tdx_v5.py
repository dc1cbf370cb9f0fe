"""TDX quotes of version 5: the genuine one with Intel's collateral, a simulated one, and what is refused of both."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from obfuscatune.parties.attestation.dcap import peek
from obfuscatune.parties.attestation.evidence import Evidence, Quote, attest
from obfuscatune.parties.attestation.policy import Policy
from obfuscatune.parties.attestation.simulated_dcap import SimulatedTdx
from obfuscatune.parties.attestation.simulated_pki import Flaws
from obfuscatune.parties.attestation.simulator import SimulatedPlatform
from obfuscatune.parties.attestation.verify import judge, judge_quote

from .enclaves import NONCE, TLS_KEY, claims, policy
from .samples import FOLDER, INTEL_OPTIONS, failed, load, needs_samples, rules

SAMPLE, COLLATERAL = "tdx/quote_v5_sample.dat", "tdx/quote_v5_collateral.json"
TIME = 1_791_590_400  # within the month of that collateral
WEAKEST = Policy(("tdx",), **INTEL_OPTIONS)
needs_collateral = pytest.mark.skipif(
    FOLDER.is_dir() and not (FOLDER / COLLATERAL).is_file(),
    reason=f"the collateral of the quote of version 5 is not in ../shared/attestation/{COLLATERAL}",
)


def corruptions(quote: Quote, count: int) -> Iterator[Quote]:
    """The quote with one bit changed, every fourth time in its collateral."""
    generator = random.Random(19)
    for number in range(count):
        extras, raw = dict(quote.extras), bytearray(quote.quote)
        # The library ignores a PCK certificate that comes with the collateral, as we do.
        data = bytearray(extras["collateral"]) if number % 4 == 0 else raw
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        if data is not raw:
            extras["collateral"] = bytes(data)
        yield Quote("tdx", bytes(raw), extras)


def same(quote: Quote, other: Quote) -> bool:
    """Whether two quotes say the same: letters of hex may be large, and a line may end behind a certificate."""
    try:
        found = [json.loads(each.extras["collateral"]) for each in (quote, other)]
    except ValueError:
        return False
    texts = [{n: t.lower() if n.endswith(("crl", "signature")) else t for n, t in each.items()} for each in found]
    return quote.quote == other.quote and texts[0] == texts[1]


# The genuine one


@needs_samples
def test_the_sample_without_collateral_is_refused_for_that() -> None:
    assert failed(judge_quote(Quote("tdx", load(SAMPLE)), WEAKEST, now=TIME)) == ["collateral"]


@needs_samples
@needs_collateral
@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_sample_with_its_collateral_verifies_and_corrupted_is_refused(count: int) -> None:
    genuine = Quote("tdx", load(SAMPLE), {"collateral": load(COLLATERAL)})
    found = judge_quote(genuine, WEAKEST, now=TIME)
    assert not found.failed and not found.simulation, str(found)
    assert rules(found)["tcb status"] is True and rules(found)["mrservicetd"] is True
    assert found.measurements["mrtd"] == peek(load(SAMPLE))["mrtd"]
    for changed in corruptions(genuine, count):
        assert judge_quote(changed, WEAKEST, now=TIME).failed or same(changed, genuine)


# A simulated one


def guest(simulated_tdx: SimulatedPlatform, **flaws: bool) -> SimulatedTdx:
    """A TD 1.5 on the simulated platform."""
    stored = json.loads((Path(simulated_tdx.root).parent / "hardware.key").read_text())["keys"]
    keys = {name: load_pem_private_key(text.encode(), None) for name, text in stored.items()}
    root = x509.load_pem_x509_certificate(Path(simulated_tdx.root).read_bytes())
    mrtd = bytes.fromhex(simulated_tdx.measurements()["mrtd"])
    return SimulatedTdx(keys, root, mrtd, bytes(16), Flaws(**flaws), version=5)


def test_an_enclave_with_quotes_of_version_5_is_accepted(simulated_tdx: SimulatedPlatform) -> None:
    evidence = attest(guest(simulated_tdx), claims().to_dict())
    assert evidence.quote.quote[:2] == b"\5\0"
    verdict = judge(Evidence.from_bytes(evidence.to_bytes()), policy(simulated_tdx), nonce=NONCE, tls_key=TLS_KEY)
    assert verdict.accepted and verdict.simulation and rules(verdict)["mrservicetd"] is True, str(verdict)


def test_a_service_td_is_refused_by_name_whatever_the_policy_says(simulated_tdx: SimulatedPlatform) -> None:
    """It could move the TD to another host; the library verifies no quote of a TD that has one."""
    evidence, named = attest(guest(simulated_tdx, service_td=True), claims().to_dict()), policy(simulated_tdx)
    service = peek(evidence.quote.quote)["mrservicetd"]
    allowing = policy(simulated_tdx, measurements={**named.measurements, "mrservicetd": frozenset({service})})
    for each in (named, allowing):
        refused = judge(evidence, each, nonce=NONCE)
        assert not refused.accepted and failed(refused)[0] == "mrservicetd" and service in str(refused)


@pytest.mark.parametrize("flaw", ["debug", "outdated_tcb", "expired_collateral"])
def test_a_flawed_platform_is_refused(flaw: str, simulated_tdx: SimulatedPlatform) -> None:
    evidence = attest(guest(simulated_tdx, **{flaw: True}), claims().to_dict())
    assert not judge(evidence, policy(simulated_tdx), nonce=NONCE).accepted


@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_corruptions_are_refused(count: int, simulated_tdx: SimulatedPlatform) -> None:
    named, genuine = policy(simulated_tdx), guest(simulated_tdx).quote(bytes(64))
    assert not judge_quote(genuine, named).failed
    for changed in corruptions(genuine, count):
        assert judge_quote(changed, named).failed or same(changed, genuine)
