"""Random corruptions of each piece of evidence, real and simulated: all refused, and by a verdict.

A hundred of each in every run, a thousand in the slow tier.
"""

import json
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from obfuscatune.errors import FormatError
from obfuscatune.parties.attestation.evidence import Evidence, Quote
from obfuscatune.parties.attestation.policy import Policy
from obfuscatune.parties.attestation.verify import judge, judge_quote

from .enclaves import NONCE, TLS_KEY, evidence, policy
from .samples import (
    DEBUG_POLICY,
    SGX_POLICY,
    SGX_TIME,
    SNP_POLICY,
    SNP_TIME,
    TDX_POLICY,
    TDX_TIME,
    dcap,
    google,
    needs_samples,
    virtee,
)

COUNTS = [100, pytest.param(1000, marks=pytest.mark.slow)]


def so_many(count: int) -> settings:
    return settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )


SAMPLES: dict[str, tuple[Callable[[], Quote], Policy, int]] = {
    "sgx": (lambda: dcap("sgx"), SGX_POLICY, SGX_TIME),
    "tdx": (lambda: dcap("tdx"), TDX_POLICY, TDX_TIME),
    "snp": (virtee, SNP_POLICY, SNP_TIME),
    "snp debug": (google, DEBUG_POLICY, SNP_TIME),
}


def corrupt(data: bytes, draw: Callable[[st.SearchStrategy[int]], int]) -> bytes:
    """Flip a bit, cut the end, leave bytes out, double some, or overwrite some; the result may be the same."""
    at = draw(st.integers(0, len(data) - 1))
    size = draw(st.integers(1, 64))
    kind = draw(st.integers(0, 4))
    if kind == 0:
        return data[:at] + bytes([data[at] ^ 1 << size % 8]) + data[at + 1 :]
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + data[at + size :]
    if kind == 3:
        return data[: at + size] + data[at:]
    return data[:at] + bytes([draw(st.integers(0, 255))]) * size + data[at + size :]


def reading(quote: Quote) -> tuple[object, ...]:
    """What a quote and its extras say: zeros and a line's end behind it, white space of JSON, letters of hex do not."""
    extras = dict(quote.extras)
    try:
        collateral = json.loads(extras.pop("collateral", b"null"))
        if isinstance(collateral, dict):
            hexes = {
                name: str(collateral.get(name)).lower() for name in collateral if name.endswith(("crl", "signature"))
            }
            collateral = {**collateral, **hexes}
            collateral = {name: str(text).rstrip("\n").replace("\r\n", "\n") for name, text in collateral.items()}
    except ValueError:
        collateral = None
    chain = extras.get("certificates", b"").rstrip(b"\n").replace(b"\r\n", b"\n")
    return (quote.quote.rstrip(b"\0\n") if quote.kind != "snp" else quote.quote, collateral, chain)


@needs_samples
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", SAMPLES)
def test_corrupted_real_evidence_is_refused(name: str, count: int) -> None:
    make, weakest, now = SAMPLES[name]
    genuine = make()
    assert not judge_quote(genuine, weakest, now=now).failed

    @so_many(count)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        raw, extras = genuine.quote, dict(genuine.extras)
        if data.draw(st.integers(0, 3)):
            raw = corrupt(raw, data.draw)
        else:
            part = data.draw(st.sampled_from(sorted(extras)))
            extras[part] = corrupt(extras[part], data.draw)
        changed = Quote(genuine.kind, raw, extras)
        assume(reading(changed) != reading(genuine))  # so that so many of them say something else
        assert judge_quote(changed, weakest, now=now).failed

    check()


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", ["tdx", "snp"])
def test_corrupted_simulated_evidence_is_refused(kind: str, count: int, request: pytest.FixtureRequest) -> None:
    platform = request.getfixturevalue(f"simulated_{kind}")
    rules, genuine = policy(platform), evidence(platform)
    encoded = genuine.to_bytes()
    assert judge(Evidence.from_bytes(encoded), rules, nonce=NONCE, tls_key=TLS_KEY).accepted

    @so_many(count)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        try:
            if data.draw(st.booleans()):
                changed = Evidence.from_bytes(corrupt(encoded, data.draw))
            else:
                quote = Quote(kind, corrupt(genuine.quote.quote, data.draw), genuine.quote.extras)
                changed = Evidence(quote, genuine.claims)
        except FormatError:
            return
        assume(reading(changed.quote) != reading(genuine.quote) or changed.claims != genuine.claims)
        assert not judge(changed, rules, nonce=NONCE, tls_key=TLS_KEY).accepted

    check()


@settings(max_examples=1000, deadline=None)
@given(kind=st.sampled_from(["sgx", "tdx", "snp"]), raw=st.binary(max_size=2000), extra=st.binary(max_size=200))
def test_random_bytes_are_refused(kind: str, raw: bytes, extra: bytes) -> None:
    quote = Quote(kind, raw, {"collateral": extra, "certificates": extra})
    verdict = judge_quote(quote, Policy((kind,)))
    assert verdict.failed and not verdict.accepted
