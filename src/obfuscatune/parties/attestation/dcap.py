"""SGX and TDX: DCAP quotes, verified by `dcap-qvl` with collateral from a file; their platform judged by the policy.

The library checks signatures, certificates, revocation lists and dates, refuses debugging, migration and profiling of a
TD, and says in which state the platform is; that state, the measurements and the report data are judged by us. It opens
no connection here.
"""

import hashlib
import json
from typing import Any

import dcap_qvl
from cryptography import x509

from obfuscatune.errors import FormatError, printable
from obfuscatune.parties.attestation.certificates import read_chain
from obfuscatune.parties.attestation.collateral_dates import COLLATERAL, expiry
from obfuscatune.parties.attestation.dcap_layout import TEE_TYPES, Body, body_of
from obfuscatune.parties.attestation.evidence import Quote
from obfuscatune.parties.attestation.fields import Fields
from obfuscatune.parties.attestation.policy import MAX_COLLATERAL_BYTES, Policy
from obfuscatune.parties.attestation.roots import INTEL_SGX_ROOT
from obfuscatune.parties.attestation.verdict import Checked, Rule

_SIGNATURE_AND_KEY_BYTES, _QE_REPORT_AND_SIGNATURE_BYTES = 128, 384 + 64
_PCK_CHAIN, _QE_CERTIFICATION = 5, 6
# Of the body: SGX's attributes, bit 1; the TD's attributes, byte 0.
_DEBUG = {"sgx": (48, 0x02), "tdx": (120, 0xFF)}
_CHAINS = ("pck_crl_issuer_chain", "tcb_info_issuer_chain", "qe_identity_issuer_chain")
_OPTIONS = {
    "dynamic_platform": "allow_dynamic_platform",
    "cached_keys": "allow_cached_keys",
    "smt_enabled": "allow_smt",
}
FETCH_AGAIN = "fetch it again: obfuscatune attest collateral fetch"
_LAST_SECOND = 1 << 40
_MAX_MESSAGE = 200


def check(evidence_quote: Quote, policy: Policy, now: float) -> Checked:
    """Verify a DCAP quote at Unix second ``now`` and judge its platform.

    The root is the last certificate of the quote's own chain, if it is Intel's, or one that the policy lists for
    simulation; the library verifies everything under it alone.

    Raises:
        FormatError: the quote or its collateral breaks its format.
    """
    kind, raw = evidence_quote.kind, evidence_quote.quote
    body, chain = _split(raw, kind)
    at, mask = _DEBUG[kind]
    debug = bool(body.data[at] & mask)  # not verified yet, but to refuse it is right in any case
    rules = [Rule("debug", not debug, "a TD or enclave for debugging" if debug else "no", "no")]
    measurements = body.measurements
    if service := measurements.get("mrservicetd"):
        rules.append(_no_service(service))
        if not rules[-1].passed:  # the library refuses it too, but as a signature, which would be no help
            return Checked(rules)
    text = policy.collateral
    if text is None and "collateral" in evidence_quote.extras:
        text = _decode(evidence_quote.extras["collateral"])
    if text is None:
        rules.append(Rule("collateral", False, "none", "in the evidence, or a file named by the policy"))
        return Checked(rules)
    root = read_chain(chain, "certificates of the quote")[-1].der
    genuine = hashlib.sha256(root).hexdigest() == INTEL_SGX_ROOT
    simulation = not genuine and policy.allow_simulation and root in policy.simulation_roots
    expected = "Intel's root" + (", or the policy's for simulation" if policy.allow_simulation else "")
    if not genuine and not simulation:
        return Checked([*rules, Rule("signature", False, "certificates under another root", expected)])
    collateral = _collateral(text, root)
    dates = _dates(text, now)
    if not dates.passed:  # the library refuses it too, but as a signature, which would not say what to do
        return Checked([*rules, dates])
    found, problem = _verify(raw, collateral, root, now)
    if found is None:
        return Checked([*rules, Rule("signature", False, problem, "a quote that verifies")])
    under = "under the simulation's root" if simulation else "under Intel's root"
    rules += [Rule("signature", True, under, expected), dates, *_platform(found, policy)]
    rules += _revocation(collateral, now)
    if kind == "sgx":
        measurements |= {name: str(found["report"]["SgxEnclave"][name]) for name in ("isv_prod_id", "isv_svn")}
    return Checked(rules, body.report_data, measurements, simulation)


def peek(raw: bytes) -> dict[str, str]:
    """Return measurements and report data of a quote, NOT verified: to be shown, never to be trusted.

    Raises:
        FormatError: not a DCAP quote.
    """
    kind = next((kind for kind, tee in TEE_TYPES.items() if raw[4:8] == tee.to_bytes(4, "little")), "any kind")
    body, _ = _split(raw, kind)
    return {**body.measurements, "report data": body.report_data.hex()}


def _split(raw: bytes, kind: str) -> tuple[Body, bytes]:
    """Return the body, and the PCK's certificates (PEM); every length must fit the next.

    What no signature covers has one value: nothing is hidden behind the quote, and one quote has one form.
    """
    body, version = body_of(raw, kind), int.from_bytes(raw[0:2], "little")
    reader = Fields(raw, "quote", body.at + len(body.data))
    signature = Fields(reader.take(reader.number(4)), "quote")
    if any(reader.take(reader.left)):
        raise FormatError("bytes behind the quote")
    signature.take(_SIGNATURE_AND_KEY_BYTES)
    if version > 3:
        if signature.number(2) != _QE_CERTIFICATION:
            raise FormatError("quote without the quoting enclave's certification")
        nested = signature.take(signature.number(4))
        signature.end()
        signature = Fields(nested, "quote")
    signature.take(_QE_REPORT_AND_SIGNATURE_BYTES)
    signature.take(signature.number(2))
    if signature.number(2) != _PCK_CHAIN:
        raise FormatError("quote without the certificates of its platform", expected="certification data of type 5")
    chain = signature.take(signature.number(4))
    signature.end()
    return body, chain.removesuffix(b"\0")


def _collateral(text: str, root: bytes) -> dict[str, str]:
    """Return the fields of the collateral; its chains, parts of which the library ignores, must be under ``root``."""
    try:
        fields = json.loads(text) if len(text) <= MAX_COLLATERAL_BYTES else None
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict) or not set(fields) >= COLLATERAL:
        raise FormatError("collateral is not JSON of dcap-qvl", expected="its nine fields")
    # A PCK certificate that comes with it is left out: the quote has its own.
    fields = {name: fields[name] for name in sorted(COLLATERAL)}
    if not all(isinstance(value, str) for value in fields.values()):
        raise FormatError("collateral has a field that is no text")
    for name in _CHAINS:
        chain = read_chain(fields[name].encode(), f"collateral's {name}")
        if chain[-1].der != root or len(chain) != 2 or not chain[0].issued_by(chain[1]):
            raise FormatError(f"collateral's {name} is not a certificate under the quote's root, and this root")
    return fields


def _verify(raw: bytes, collateral: dict[str, str], root: bytes, now: float) -> tuple[dict[str, Any] | None, str]:
    """Return what the library found, or None and why it refuses."""
    second = min(max(int(now), 0), _LAST_SECOND)
    try:
        material = dcap_qvl.QuoteCollateralV3.from_json(json.dumps(collateral))
        # claims_only: signatures, revocation and dates; the state of the platform is for our rules, which name it.
        policy = dcap_qvl.QuotePolicy.claims_only(second)
        claims = dcap_qvl.QuoteVerifier(root).verify_with_policy(raw, material, second, policy)
        found = json.loads(claims.to_json())
    except ValueError as error:
        return None, printable(error, most=_MAX_MESSAGE)
    # Levels of TCB are numbered by the PCE: the library compares the platform's model alone, Intel's own both.
    if bytes(found["platform"]["pck"]["pce_id"]).hex() != json.loads(collateral["tcb_info"])["pceId"].lower():
        return None, "Verification failed: TCB info of another PCE"
    return found, ""


def _dates(text: str, now: float) -> Rule:
    end = min(expiry(text.encode()).values())
    held, until = now <= end.timestamp(), f"{end:%Y-%m-%d %H:%M}"
    return Rule(
        "collateral",
        held,
        f"good until {until}" if held else f"expired {until}",
        "not expired" if held else f"not expired: {FETCH_AGAIN}",
    )


def _platform(found: dict[str, Any], policy: Policy) -> list[Rule]:
    status, advisories = found["tcb"]["status"], found["tcb"]["advisory_ids"]
    pck = found["platform"]["pck"]
    wanting = [option for name, option in _OPTIONS.items() if pck[name] == "True" and not getattr(policy, option)]
    return [
        Rule("tcb status", status in policy.tcb_status, status, " or ".join(policy.tcb_status)),
        Rule(
            "advisories",
            set(advisories) <= set(policy.advisories),
            ", ".join(advisories) or "none",
            ", ".join(policy.advisories) or "none",
        ),
        Rule(
            "platform",
            not wanting,
            f"needs {', '.join(wanting)}" if wanting else "nothing that the policy forbids",
            "allowed by the policy by these names",
        ),
    ]


def _no_service(service: str) -> Rule:
    """A service TD may do to the TD that it is bound to what its code does: move it to another host."""
    none = not int(service, 16)
    return Rule("mrservicetd", none, "none" if none else service, "no service TD, whatever the policy says")


def _revocation(collateral: dict[str, str], now: float) -> list[Rule]:
    """Refuse revocation lists of later than ``now``, which the library lets pass: they say nothing of that time."""
    try:
        lists = [x509.load_der_x509_crl(bytes.fromhex(collateral[name])) for name in ("root_ca_crl", "pck_crl")]
    except ValueError:
        raise FormatError("collateral's revocation lists cannot be read") from None
    issued = max(item.last_update_utc for item in lists)
    if issued.timestamp() <= now:
        return []
    return [Rule("revocation", False, f"lists of {issued:%Y-%m-%d %H:%M}, which is later", "lists of the time judged")]


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise FormatError("collateral is not UTF-8") from None
