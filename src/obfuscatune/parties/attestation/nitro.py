"""AWS Nitro Enclaves: an attestation document under Amazon's root, verified here on `cryptography`.

    document = COSE_Sign1 [protected {1: -35}, {}, payload, signature]        ES384 = ECDSA P-384, SHA-384
    payload  = {module_id, digest, timestamp, pcrs, certificate, cabundle, public_key, user_data, nonce}
    cabundle[0] (root, known by its hash) -> ... -> cabundle[-1] -> certificate, all P-384; the last lives three hours

The report data are ``user_data``. An enclave in debug mode has PCRs of zeros. The document comes from a hypervisor that
Amazon runs: against Amazon itself it proves nothing. Format: AWS Nitro Enclaves, "Verifying the root of trust".
"""

import hashlib
from typing import Any

import cbor2
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384

from obfuscatune.errors import FormatError
from obfuscatune.parties.attestation.certificates import Certificate, p384_chain_problem
from obfuscatune.parties.attestation.evidence import Quote
from obfuscatune.parties.attestation.fields import parsing
from obfuscatune.parties.attestation.policy import Policy
from obfuscatune.parties.attestation.roots import AWS_NITRO_ROOT
from obfuscatune.parties.attestation.verdict import Checked, Rule

_PROTECTED = bytes.fromhex("a1013822")  # {1: -35}: the algorithm, ES384
_SIGNATURE_BYTES, _PCR_BYTES, _PCRS = 96, 48, 32
_MAX_CHAIN = 8
_FIELDS = {
    *("module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle"),
    *("public_key", "user_data", "nonce"),
}
_REPORT_DATA_BYTES = 64
_TAG = 6  # CBOR's major type
PREFIX = "nitro_"  # of the names of its PCRs, which are of 48 bytes and not those of a TPM


def check(quote: Quote, policy: Policy, now: float) -> Checked:
    """Verify a document at Unix second ``now``.

    Raises:
        FormatError: it breaks its format.
    """
    payload, signature, fields = _decode(quote.quote)
    chain = [Certificate(der) for der in (*fields["cabundle"], fields["certificate"])]
    root = chain[0].der
    genuine = hashlib.sha256(root).hexdigest() == AWS_NITRO_ROOT
    simulation = not genuine and policy.allow_simulation and root in policy.simulation_roots
    expected = "Amazon's root" + (", or the policy's for simulation" if policy.allow_simulation else "")
    problem = p384_chain_problem(chain, now)
    if not genuine and not simulation:
        problem = "certificates under another root"
    under = "under the simulation's root" if simulation else "under Amazon's root"
    rules = [Rule("certificates", not problem, problem or under, expected)]
    signed = _signed(chain[-1], payload, signature)
    rules.append(Rule("signature", signed, "genuine" if signed else "not by this certificate's key", "genuine"))
    if problem or not signed:
        return Checked(rules)
    measurements = _measurements(fields)
    debug = not int(measurements[f"{PREFIX}pcr0"], 16)
    rules.append(Rule("debug", not debug, "an enclave for debugging" if debug else "no", "no"))
    return Checked(rules, _report_data(fields), measurements, simulation)


def peek(document: bytes) -> dict[str, str]:
    """Return measurements and report data of a document, NOT verified; raises FormatError where it is none."""
    fields = _decode(document)[2]
    return {**_measurements(fields), "report data": _report_data(fields).hex()}


def _decode(document: bytes) -> tuple[bytes, bytes, dict[str, Any]]:
    """Return payload, signature and the payload's fields; one document has one form."""
    parts = _loads(document, "Nitro document")
    with parsing("Nitro document"):  # older versions of cbor2 decode a break within a list, and cannot encode it
        shortest = cbor2.dumps(parts) == document
    if not isinstance(parts, list) or len(parts) != 4 or not shortest:
        raise FormatError("not a Nitro document", expected="COSE_Sign1 without a tag, in the shortest form")
    protected, unprotected, payload, signature = parts
    right = type(payload) is bytes and type(signature) is bytes and len(signature) == _SIGNATURE_BYTES
    if protected != _PROTECTED or unprotected != {} or not right:
        raise FormatError("not a Nitro document", expected="ES384 and nothing unprotected")
    fields = _loads(payload, "Nitro document")
    if not isinstance(fields, dict) or set(fields) != _FIELDS or fields["digest"] != "SHA384":
        raise FormatError("Nitro document with other fields", expected=", ".join(sorted(_FIELDS)))
    chain = fields["cabundle"]
    if not isinstance(chain, list) or not 1 <= len(chain) <= _MAX_CHAIN:
        raise FormatError("certificates of a Nitro document", expected=f"1 to {_MAX_CHAIN}")
    if not all(type(der) is bytes for der in (*chain, fields["certificate"])):
        raise FormatError("certificates of a Nitro document are no bytes")
    return payload, signature, fields


def _loads(data: bytes, what: str) -> Any:
    """Decode CBOR of maps, lists, bytes, texts and numbers: a tag could build other things."""

    def refuse(decoder: Any, tag: Any) -> None:
        raise FormatError(f"{what} with a tag of CBOR")

    with parsing(what):
        if data[:1] and data[0] >> 5 == _TAG:
            raise FormatError(f"{what} with a tag of CBOR")
        return cbor2.loads(data, tag_hook=refuse)


def _measurements(fields: dict[str, Any]) -> dict[str, str]:
    pcrs = fields["pcrs"]
    if not isinstance(pcrs, dict) or 0 not in pcrs:
        raise FormatError("Nitro document without PCRs")
    for index, value in pcrs.items():
        if type(index) is not int or index not in range(_PCRS) or type(value) is not bytes or len(value) != _PCR_BYTES:
            raise FormatError("PCR of a Nitro document", expected=f"{_PCR_BYTES} bytes, of number 0 to {_PCRS - 1}")
    return {f"{PREFIX}pcr{index}": value.hex() for index, value in sorted(pcrs.items())}


def _report_data(fields: dict[str, Any]) -> bytes:
    data = fields["user_data"]
    if type(data) is not bytes or len(data) != _REPORT_DATA_BYTES:
        raise FormatError("user data of a Nitro document", expected=f"{_REPORT_DATA_BYTES} bytes")
    return data


def _signed(leaf: Certificate, payload: bytes, signature: bytes) -> bool:
    if not isinstance(leaf.key, EllipticCurvePublicKey):
        return False
    r, s = (int.from_bytes(part, "big") for part in (signature[:48], signature[48:]))
    message = cbor2.dumps(["Signature1", _PROTECTED, b"", payload])
    try:
        leaf.key.verify(encode_dss_signature(r, s), message, ECDSA(SHA384()))
    except InvalidSignature:
        return False
    return True
