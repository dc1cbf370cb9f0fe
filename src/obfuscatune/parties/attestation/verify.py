"""The judgement: one piece of evidence, one policy, one verdict with all its rules.

The quote is verified by the module of its format; what it measures and binds is judged here, the same for all formats.
Bad evidence never raises: its verdict names the rule that failed.
"""

import hmac
import importlib
import time
from collections.abc import Callable, Mapping

from obfuscatune.errors import AttestationError, FormatError
from obfuscatune.parties.attestation.claims import EnclaveClaims
from obfuscatune.parties.attestation.evidence import Evidence, Kind, Quote, report_data
from obfuscatune.parties.attestation.fields import parsing
from obfuscatune.parties.attestation.gpu import EXTRAS, gpu_nonce, judge_gpu
from obfuscatune.parties.attestation.policy import MEASUREMENTS, Policy
from obfuscatune.parties.attestation.verdict import Checked, Rule, Verdict

# The enclave's clock may be ahead of the verifier's by this much, in seconds.
CLOCK_SKEW_SECONDS = 60
_MODULES: dict[Kind, str] = {
    "sgx": "dcap",
    "tdx": "dcap",
    "snp": "snp",
    "tpm": "tpm",
    "nitro": "nitro",
    "azure": "azure",
}


def judge(
    evidence: Evidence,
    policy: Policy,
    *,
    nonce: str | None = None,
    tls_key: str | None = None,
    now: float | None = None,
) -> Verdict:
    """Judge evidence of an enclave.

    Args:
        evidence: not verified. policy: the verifier's own.
        nonce: 64 hex digits that the verifier has sent, or "" where there must be none; None: not judged.
        tls_key: SHA-256 of the SubjectPublicKeyInfo of the peer's TLS key, hex; None: not judged.
        now: Unix seconds; by default the clock's.
    """
    now = time.time() if now is None else now
    checked = _check(evidence.quote, policy, now)
    rules = [_kind(evidence.quote, policy), *checked.rules, *_code(evidence.quote, checked, policy)]
    claims: EnclaveClaims | None = None
    problem = "bound by the quote"
    try:
        claims = EnclaveClaims.from_dict(dict(evidence.claims))
        if not _binds(evidence, checked):
            claims, problem = None, "not bound by a verified quote"
    except FormatError as error:
        problem = error.what
    rules.append(Rule("claims", claims is not None, problem, "bound by the quote"))
    nonce_of_gpu = None if claims is None else gpu_nonce(report_data(evidence.claims))
    gpu, simulated_gpu = judge_gpu(evidence.quote.extras, policy, now, nonce_of_gpu)
    rules += gpu
    if claims is not None:
        rules += [
            _same("nonce", claims.nonce, nonce, "none was asked for: only the age says how fresh this is"),
            _same("tls key", claims.tls_key, tls_key, "no connection to compare with"),
            _age(claims.issued, policy, now),
        ]
    return Verdict(tuple(rules), claims, checked.measurements, checked.simulation or simulated_gpu)


def judge_quote(quote: Quote, policy: Policy, *, now: float | None = None) -> Verdict:
    """Judge a bare quote, by the rules of the hardware alone; without claims it is never accepted.

    A policy that pins no code is let pass here: this is how to look at what a platform measures.
    """
    now = time.time() if now is None else now
    checked = _check(quote, policy, now)
    rules = [_kind(quote, policy), *checked.rules]
    if policy.pins(quote.kind):
        rules += _code(quote, checked, policy)
    else:
        rules.append(Rule("measurements", None, "any: the policy names none", "named by a policy"))
    rules.append(Rule("claims", None, "a bare quote has none", "claims of an enclave"))
    return Verdict(tuple(rules), None, checked.measurements, checked.simulation)


def _kind(quote: Quote, policy: Policy) -> Rule:
    return Rule("kind", quote.kind in policy.kinds, quote.kind, " or ".join(policy.kinds))


def judge_gpu_report(extras: Mapping[str, bytes], policy: Policy, *, now: float | None = None) -> Verdict:
    """Judge a bare report of a GPU, by the rules of GPUs alone; it is never accepted, since it is over no claims."""
    gpu, simulated = judge_gpu(extras, policy, time.time() if now is None else now)
    rules = [*gpu, Rule("claims", None, "a bare report has none", "claims of an enclave")]
    return Verdict(tuple(rules), simulation=simulated)


def _check(quote: Quote, policy: Policy, now: float) -> Checked:
    # What belongs to the GPU is judged apart.
    extras = {name: data for name, data in quote.extras.items() if name not in EXTRAS}
    quote = Quote(quote.kind, quote.quote, extras)
    try:
        with parsing("evidence"):
            return _checker(quote.kind)(quote, policy, now)
    except (FormatError, AttestationError) as error:
        got = error.what if error.got is None else f"{error.what}: {error.got}"
        return Checked([Rule("format", False, got, "" if error.expected is None else str(error.expected))])


def _checker(kind: Kind) -> Callable[[Quote, Policy, float], Checked]:
    """Return what verifies quotes of a kind; loaded when it is needed."""
    module = importlib.import_module(f"obfuscatune.parties.attestation.{_MODULES[kind]}")
    check: Callable[[Quote, Policy, float], Checked] = module.check
    return check


def _code(quote: Quote, checked: Checked, policy: Policy) -> list[Rule]:
    """Judge who vouches for the measurements, and each that the policy names."""
    if checked.report_data is None:
        return [Rule("measurements", None, "no verified quote", "a verified quote")]
    rules = []
    if checked.simulation:
        rules.append(Rule("simulation", policy.allow_simulation, "yes: it protects nothing", "allowed by the policy"))
    if not policy.pins(quote.kind):
        passed = None if policy.any_measurement and checked.simulation else False
        rules.append(Rule("measurements", passed, "any", f"a policy that pins the code of {quote.kind}"))
    for name in (name for name in MEASUREMENTS[quote.kind] if name in policy.measurements):
        got, allowed = checked.measurements.get(name, "none"), policy.measurements[name]
        rules.append(Rule(name, got in allowed, got, " or ".join(sorted(allowed))))
    if quote.kind == "sgx":
        rules += _product(checked, policy)
    if quote.kind in ("snp", "azure"):
        rules += _least("guest_svn", checked, policy.guest_svn)
    return rules


def _product(checked: Checked, policy: Policy) -> list[Rule]:
    rules = []
    product = int(checked.measurements["isv_prod_id"])
    if policy.isv_prod_id is not None:
        allowed = " or ".join(map(str, sorted(policy.isv_prod_id)))
        rules.append(Rule("isv_prod_id", product in policy.isv_prod_id, str(product), allowed))
    return rules + _least("isv_svn", checked, policy.isv_svn)


def _least(name: str, checked: Checked, least: int | None) -> list[Rule]:
    """Judge a version where the policy names one; a TD of Azure has no version of a guest."""
    if least is None:
        return []
    got = checked.measurements.get(name, "none")
    return [Rule(name, got != "none" and int(got) >= least, got, f"at least {least}")]


def _binds(evidence: Evidence, checked: Checked) -> bool:
    if checked.report_data is None:
        return False
    expected = report_data(evidence.claims)
    if evidence.quote.kind in ("tpm", "azure"):
        from obfuscatune.parties.attestation import tpm

        expected = tpm.binds(expected)
    return hmac.compare_digest(checked.report_data, expected)


def _same(name: str, got: str, expected: str | None, otherwise: str) -> Rule:
    if expected is None:
        return Rule(name, None, got or "none", otherwise)
    return Rule(name, hmac.compare_digest(got.encode(), expected.encode()), got or "none", expected or "none")


def _age(issued: int, policy: Policy, now: float) -> Rule:
    age = int(now) - issued
    fresh = -CLOCK_SKEW_SECONDS <= age <= policy.max_age_seconds
    expected = f"at most {policy.max_age_seconds} s, and at most {CLOCK_SKEW_SECONDS} s ahead of this machine's clock"
    return Rule("age", fresh, f"{age} s" if age >= 0 else f"{-age} s ahead", expected)
