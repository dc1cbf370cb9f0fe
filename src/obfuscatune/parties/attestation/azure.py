"""Azure's confidential machines: a hardware report for a paravisor, whose TPM's key it binds, and a quote of that TPM.

    SNP report, or quote of a TD, over SHA-256(runtime data) || zeros -> runtime data, JSON, has the key HCLAkPub
    -> quote of the TPM by that key

The report is for the paravisor (HCL), which runs at the most privileged level of the guest and keeps the TPM; what the
guest has booted is in the TPM's PCRs. So a policy names both: what pins the paravisor, and PCRs. Who signed the
paravisor is not enough without the least version, as the signer has signed older ones too.

    HCL report  "HCLA" | version 1 or 2 | size | request 2 | status 0 | 12 zeros | report (1184)
                | size of the rest | version 1 | type (2: SNP, 4: TDX) | hash (1: SHA-256) | length
                | runtime data | zeros

All numbers are u32, little-endian. Under TDX the report is a TD report (1024, then zeros): only the processor that made
it can check it. The machine trades it for a quote (`azure_vm`), which stands in its place in evidence, as ``td_quote``;
the report itself is left out: its bytes are zeros. Format: OpenHCL, openhcl_attestation_protocol (igvm_attest), whose
header says version 2; the paravisor before it wrote the same with version 1.
"""

import base64
import hashlib
import json
from dataclasses import dataclass, replace

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey, RSAPublicNumbers

from obfuscatune.errors import FormatError
from obfuscatune.parties.attestation import dcap, snp, tpm
from obfuscatune.parties.attestation.evidence import Quote
from obfuscatune.parties.attestation.fields import Fields, parsing
from obfuscatune.parties.attestation.policy import Policy
from obfuscatune.parties.attestation.tpm_structures import parse_quote, parse_signature
from obfuscatune.parties.attestation.verdict import Checked, Rule

_MAGIC, _VERSIONS, _REQUEST = b"HCLA", (1, 2), 2
_TYPES, _SHA256 = {2: "snp", 4: "tdx"}, 1
_RESERVED_BYTES, _REST_HEADER_BYTES = 12, 20
_REPORT_AT = 32
TD_REPORT_BYTES = 1024
_KEY_NAME = "HCLAkPub"
_RSA_BITS, _RSA_EXPONENT = 2048, 65_537
_TPM_EXTRAS = {"tpm_quote", "signature", "pcrs"}
TD_QUOTE = "td_quote"
# What may come with the report of each kind of hardware, beside what is the TPM's.
_HARDWARE_EXTRAS = {"snp": {"certificates"}, "tdx": {TD_QUOTE, "collateral"}}


@dataclass(frozen=True)
class HclReport:
    """What an HCL report is made of. Nothing of it is verified.

    Attributes:
        hardware: "snp" or "tdx". report: of the hardware, 1184 bytes. runtime: the runtime data, JSON.
    """

    hardware: str
    report: bytes
    runtime: bytes


def check(quote: Quote, policy: Policy, now: float) -> Checked:
    """Verify hardware, runtime data and the TPM's quote at Unix second ``now``, and judge the platform.

    Raises:
        FormatError: one of them breaks its format.
    """
    parts = parse(quote.quote)
    hardware = _check_hardware(parts, quote, policy, now)
    rules = list(hardware.rules)
    bound = hardware.report_data == hashlib.sha256(parts.runtime).digest() + bytes(32)
    rules.append(Rule("runtime data", bound, "genuine" if bound else "not what the hardware binds", "genuine"))
    if not bound:
        return Checked(rules)
    key = _attestation_key(parts.runtime)
    given = set(quote.extras) - _HARDWARE_EXTRAS[parts.hardware]
    if not given:
        rules.append(Rule("tpm quote", None, "none", "a quote of the machine's TPM"))
        return Checked(rules)
    if given != _TPM_EXTRAS:
        raise FormatError("what comes with an HCL report", expected=", ".join(sorted(_TPM_EXTRAS)))
    message, signature = quote.extras["tpm_quote"], parse_signature(quote.extras["signature"])
    attested = parse_quote(message)
    values = tpm.read_pcrs(quote.extras["pcrs"], attested)
    rules += [
        tpm.genuine("tpm quote", tpm.verifies(key, signature, message), "not by the key in the runtime data"),
        tpm.genuine("pcrs", tpm.pcr_digest(values, signature.hash) == attested.pcr_digest, "not the quoted values"),
    ]
    if not all(rule.passed for rule in rules[-2:]):
        return Checked(rules)
    measurements = {**hardware.measurements, **tpm.measurements(values)}
    return replace(hardware, rules=rules, report_data=attested.extra_data, measurements=measurements)


def peek(report: bytes) -> dict[str, str]:
    """Return what a report says, NOT verified; raises FormatError where it is none."""
    parts = parse(report)
    _attestation_key(parts.runtime)
    found = snp.peek(parts.report) if parts.hardware == "snp" else {}
    return {**found, "hardware": parts.hardware, "runtime data": f"{len(parts.runtime)} bytes"}


def parse(data: bytes) -> HclReport:
    """Return the parts of an HCL report; nothing is hidden between, behind or in what is reserved.

    Raises:
        FormatError: another format, or a length that does not fit.
    """
    reader = Fields(data, "HCL report")
    magic, version, size = reader.take(4), reader.number(4), reader.number(4)
    if (
        magic != _MAGIC
        or version not in _VERSIONS
        or reader.number(4) != _REQUEST
        or reader.number(4)
        or any(reader.take(_RESERVED_BYTES))
    ):
        raise FormatError("not an HCL report of a machine", expected='"HCLA", version 1 or 2')
    report = reader.take(snp.REPORT_BYTES)
    told, form, kind, hashed, length = (reader.number(4) for _ in range(5))
    if kind not in _TYPES or (form, hashed) != (1, _SHA256) or told != length + _REST_HEADER_BYTES:
        raise FormatError("runtime data of an HCL report of an unknown form")
    runtime = reader.take(length)
    if size != reader.at:
        raise FormatError("size of an HCL report", got=size, expected=reader.at)
    if any(reader.take(reader.left)):
        raise FormatError("bytes behind the HCL report")
    return HclReport(_TYPES[kind], report, runtime)


def without_report(data: bytes) -> bytes:
    """Return the HCL report with zeros for the hardware's report, as evidence of a TD has it."""
    return data[:_REPORT_AT] + bytes(snp.REPORT_BYTES) + data[_REPORT_AT + snp.REPORT_BYTES :]


def _check_hardware(parts: HclReport, quote: Quote, policy: Policy, now: float) -> Checked:
    """Judge the report of SNP, or the quote of a TD that stands for its report."""
    extras = {name: data for name, data in quote.extras.items() if name in _HARDWARE_EXTRAS[parts.hardware]}
    if parts.hardware == "snp":
        return snp.check(Quote("snp", parts.report, extras), policy, now)
    raw = extras.pop(TD_QUOTE, None)
    if raw is None:
        hint = "a TD report is checked by its processor alone: the machine trades it for a quote"
        return Checked([Rule("td quote", False, "none", f"a quote of the TD in {TD_QUOTE}; {hint}")])
    if any(parts.report):
        raise FormatError("HCL report with the TD report that its quote stands for", expected="zeros")
    return dcap.check(Quote("tdx", raw, extras), policy, now)


def _attestation_key(runtime: bytes) -> RSAPublicKey:
    """Return the TPM's key out of the runtime data, a JWK of RSA-2048."""
    try:
        keys = json.loads(runtime.decode("utf-8"))["keys"]
        (key,) = [key for key in keys if key["kid"] == _KEY_NAME]
        modulus, exponent = (int.from_bytes(_base64url(key[name]), "big") for name in ("n", "e"))
        kind = (key["kty"], key["key_ops"], exponent, modulus.bit_length())
    except (ValueError, KeyError, TypeError, RecursionError):
        raise FormatError("runtime data without one key of the TPM", expected=_KEY_NAME) from None
    if kind != ("RSA", ["sign"], _RSA_EXPONENT, _RSA_BITS):
        raise FormatError("key of the TPM in the runtime data", expected="RSA-2048 for signatures")
    with parsing("key of the TPM in the runtime data"):
        return RSAPublicNumbers(exponent, modulus).public_key()


def _base64url(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
