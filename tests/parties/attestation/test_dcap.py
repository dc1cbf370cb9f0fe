"""SGX and TDX on Intel's real evidence, and what is refused of it."""

import json
from dataclasses import replace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from obfuscatune.errors import AttestationError, FormatError
from obfuscatune.parties.attestation import dcap as module
from obfuscatune.parties.attestation import simulated_dcap
from obfuscatune.parties.attestation.dcap_layout import body_of
from obfuscatune.parties.attestation.evidence import Quote
from obfuscatune.parties.attestation.policy import Policy
from obfuscatune.parties.attestation.quoting import bound_quote, own_measurements
from obfuscatune.parties.attestation.verify import judge_quote

from .enclaves import root
from .samples import (
    SGX_POLICY,
    SGX_TIME,
    TDX_POLICY,
    TDX_TIME,
    changed,
    dcap,
    failed,
    load,
    needs_samples,
    with_extra,
)

pytestmark = needs_samples
POLICIES = {"sgx": (SGX_POLICY, SGX_TIME), "tdx": (TDX_POLICY, TDX_TIME)}
MONTH = 31 * 86_400


def verdict(quote: Quote, policy: Policy | None = None, now: float | None = None):
    weakest, time = POLICIES[quote.kind]
    return judge_quote(quote, policy or weakest, now=time if now is None else now)


def collateral(kind: str, **changes: str) -> bytes:
    return json.dumps({**json.loads(load(f"dcap/{kind}_quote_collateral.json")), **changes}).encode()


@pytest.mark.parametrize("kind", ["sgx", "tdx"])
def test_the_samples_verify(kind: str) -> None:
    found = verdict(dcap(kind))
    assert not found.failed, str(found)
    assert not found.simulation
    assert found.measurements["mrtd" if kind == "tdx" else "mrenclave"][:8] in ("91eb2b44", "33d8736d")


def test_the_strict_policy_refuses_the_outdated_sgx_sample() -> None:
    found = verdict(dcap("sgx"), Policy(("sgx",)))
    assert failed(found) == ["tcb status", "advisories"]
    got = {rule.name: rule.got for rule in found.failed}
    assert got == {"tcb status": "ConfigurationAndSWHardeningNeeded", "advisories": "INTEL-SA-00289, INTEL-SA-00615"}


def test_the_strict_policy_refuses_properties_of_the_tdx_sample_by_name() -> None:
    found = verdict(dcap("tdx"), Policy(("tdx",)))
    assert failed(found) == ["platform"]
    assert found.failed[0].got == "needs allow_dynamic_platform, allow_cached_keys, allow_smt"


@pytest.mark.parametrize(("kind", "at"), [("sgx", 48 + 64), ("sgx", 48 + 320), ("tdx", 48 + 136), ("tdx", 48 + 520)])
def test_a_changed_measurement_or_report_data_is_refused(kind: str, at: int) -> None:
    assert failed(verdict(changed(dcap(kind), at))) == ["signature"]


@pytest.mark.parametrize(("kind", "at", "bit"), [("sgx", 48 + 48, 2), ("tdx", 48 + 120, 1)])
def test_debugging_is_named(kind: str, at: int, bit: int) -> None:
    assert failed(verdict(changed(dcap(kind), at, bit), replace(POLICIES[kind][0], allow_debug=True)))[0] == "debug"


@pytest.mark.parametrize("kind", ["sgx", "tdx"])
@pytest.mark.parametrize("shift", [MONTH, -MONTH, 400 * 86_400])
def test_collateral_is_judged_at_the_time_of_the_judgement(kind: str, shift: int) -> None:
    assert failed(verdict(dcap(kind), now=POLICIES[kind][1] + shift))


@pytest.mark.parametrize("now", [-1e30, 0, 1e30])
def test_impossible_times_are_refusals(now: float) -> None:
    assert failed(verdict(dcap("tdx"), now=now))


def test_a_quote_of_one_kind_is_none_of_the_other() -> None:
    assert failed(verdict(Quote("sgx", dcap("tdx").quote, dcap("tdx").extras))) == ["format"]
    assert failed(verdict(dcap("tdx"), SGX_POLICY))[0] == "kind"


def test_collateral_of_another_platform_is_refused() -> None:
    assert failed(verdict(with_extra(dcap("tdx"), "collateral", load("dcap/sgx_quote_collateral.json")))) == [
        "signature"
    ]


def test_chains_of_the_collateral_swapped_or_cut_are_refused() -> None:
    fields = json.loads(load("dcap/tdx_quote_collateral.json"))
    crl, tcb = fields["pck_crl_issuer_chain"], fields["tcb_info_issuer_chain"]
    for changes in (
        {"tcb_info_issuer_chain": crl},
        {"tcb_info_issuer_chain": tcb[tcb.index("-----BEGIN", 1) :]},
        {"tcb_info_issuer_chain": ""},
        {"root_ca_crl": fields["pck_crl"]},
        {"tcb_info": fields["qe_identity"]},
        {"tcb_info_signature": fields["qe_identity_signature"]},
    ):
        assert failed(verdict(with_extra(dcap("tdx"), "collateral", collateral("tdx", **changes))))


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b"\xff", b"[" * 10_000, b'{"tcb_info": 3}', b" " * 300_000])
def test_collateral_that_is_none_is_refused(text: bytes) -> None:
    assert failed(verdict(with_extra(dcap("tdx"), "collateral", text))) == ["format"]


def test_a_root_of_the_simulation_does_not_vouch_for_real_quotes_nor_the_real_one_for_simulated(simulated_tdx) -> None:
    both = replace(TDX_POLICY, allow_simulation=True, simulation_roots=(root(simulated_tdx),))
    real = verdict(dcap("tdx"), both)
    assert not real.failed and not real.simulation
    forged = simulated_tdx.attester.quote(bytes(64))
    assert failed(judge_quote(forged, TDX_POLICY)) == ["signature"]
    assert judge_quote(forged, both).simulation


def test_a_real_root_pasted_into_a_simulated_chain_is_refused(simulated_tdx) -> None:
    """Whichever root a quote names, all of it must verify under that root."""
    forged = simulated_tdx.attester.quote(bytes(64))
    chain = forged.quote[forged.quote.index(b"-----BEGIN") :]
    quote = dcap("tdx")
    intel = x509.load_pem_x509_certificates(quote.quote[quote.quote.index(b"-----BEGIN") :].rstrip(b"\0"))[-1]
    theirs = x509.load_pem_x509_certificates(chain)[-1].public_bytes(Encoding.PEM)
    ours = intel.public_bytes(Encoding.PEM)
    raw = forged.quote.replace(theirs, ours)
    shift = len(ours) - len(theirs)
    for at in (632, 632 + 4 + 130, len(forged.quote) - len(chain) - 4):  # the three lengths around the chain
        raw = raw[:at] + (int.from_bytes(raw[at : at + 4], "little") + shift).to_bytes(4, "little") + raw[at + 4 :]
    both = replace(TDX_POLICY, allow_simulation=True, simulation_roots=(root(simulated_tdx),))
    found = verdict(Quote("tdx", raw, quote.extras), both)
    assert failed(found) == ["signature"]
    assert found.failed[0].got.startswith("Verification failed")
    assert not found.simulation


def test_nothing_is_hidden_behind_a_quote() -> None:
    quote = dcap("tdx")
    assert not verdict(Quote("tdx", quote.quote + bytes(100), quote.extras)).failed
    assert failed(verdict(Quote("tdx", quote.quote + b"\1", quote.extras))) == ["format"]
    for size in (0, 10, 48, 700, 1300, 4900):
        assert failed(verdict(Quote("tdx", quote.quote[:size], quote.extras))) == ["format"]


def test_the_librarys_own_service_is_never_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("no network here")

    monkeypatch.setattr(module.dcap_qvl, "get_collateral", refuse)
    assert failed(verdict(Quote("tdx", dcap("tdx").quote))) == ["collateral"]


def test_peeking_needs_no_collateral_and_refuses_what_is_no_quote() -> None:
    assert module.peek(load("dcap/tdx_quote"))["mrtd"].startswith("91eb2b44")
    assert module.peek(load("dcap/sgx_quote"))["mrenclave"].startswith("33d8736d")
    with pytest.raises(FormatError):
        module.peek(b"no quote")


def test_tcb_info_of_another_pce_is_refused(simulated_tdx, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library lets it pass, though levels of TCB are numbered by the PCE."""
    policy = replace(TDX_POLICY, allow_simulation=True, simulation_roots=(root(simulated_tdx),))
    assert not failed(judge_quote(simulated_tdx.attester.quote(bytes(64)), policy))
    monkeypatch.setattr(simulated_dcap, "_PCE_ID", b"\0\1")  # of the collateral alone: the PCK's was made before
    found = judge_quote(simulated_tdx.attester.quote(bytes(64)), policy)
    assert failed(found) == ["signature"] and "TCB info of another PCE" in str(found)


# Version 5: the body's type and size come before it


class Gives:
    """An attester that has this quote."""

    def __init__(self, kind: str, raw: bytes) -> None:
        self.kind, self.raw = kind, raw

    def quote(self, report_data: bytes) -> Quote:
        return Quote(self.kind, self.raw)


V5 = "tdx/quote_v5_sample.dat"


def test_an_enclave_takes_its_own_quote_of_version_5() -> None:
    raw = load(V5)
    theirs = module.dcap_qvl.parse_quote(raw).report
    assert bound_quote("tdx", raw, theirs.report_data, {}).quote == raw
    with pytest.raises(AttestationError, match="other report data"):
        bound_quote("tdx", raw, bytes(64), {})
    told = module.peek(raw)
    assert told["mrtd"] == theirs.mr_td.hex() and told["rtmr3"] == theirs.rt_mr3.hex()
    assert told["mrservicetd"] == theirs.mr_service_td.hex() and told["report data"] == theirs.report_data.hex()
    own = own_measurements(Gives("tdx", raw))
    assert own == {name: told[name] for name in ("mrtd", "rtmr0", "rtmr1", "rtmr2", "rtmr3")}


@pytest.mark.parametrize(("at", "value"), [(48, 1), (48, 4), (48, 0), (50, 0x48), (50, 0x89), (51, 9)])
def test_a_body_of_another_type_or_size_is_refused(at: int, value: int) -> None:
    raw = bytearray(load(V5))
    raw[at] = value
    with pytest.raises(FormatError, match="body of a tdx quote of an unknown type"):
        module.peek(bytes(raw))
    assert failed(verdict(Quote("tdx", bytes(raw), dcap("tdx").extras))) == ["format"]


def test_places_of_every_version_are_those_of_the_library() -> None:
    for name, kind in (("dcap/tdx_quote", "tdx"), ("dcap/sgx_quote", "sgx"), (V5, "tdx")):
        report, body = module.dcap_qvl.parse_quote(load(name)).report, body_of(load(name), kind)
        assert body.report_data == report.report_data
        names = {"mrenclave": "mr_enclave", "mrsigner": "mr_signer", "mrtd": "mr_td", "mrseam": "mr_seam"}
        names |= {"mrconfigid": "mr_config_id", "mrowner": "mr_owner", "mrownerconfig": "mr_owner_config"}
        names |= {f"rtmr{n}": f"rt_mr{n}" for n in range(4)} | {"mrservicetd": "mr_service_td"}
        assert body.measurements == {n: getattr(report, names[n]).hex() for n in body.measurements}


def test_revocation_lists_of_later_are_refused() -> None:
    """The library lets them pass: a list of tomorrow says nothing of today."""
    fields = json.loads(load("dcap/tdx_quote_collateral.json"))
    lists = [x509.load_der_x509_crl(bytes.fromhex(fields[name])) for name in ("root_ca_crl", "pck_crl")]
    issued = max(item.last_update_utc.timestamp() for item in lists)
    assert module._revocation(fields, issued) == []
    assert [rule.passed for rule in module._revocation(fields, issued - 1)] == [False]
    assert issued <= TDX_TIME
