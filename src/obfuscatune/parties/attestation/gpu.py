"""The GPU of a confidential machine: NVIDIA's report, verified offline here on `cryptography`, beside the CPU's quote.

    NVIDIA Device Identity CA (known by its hash) -> ... -> key of the GPU, P-384, made for the firmware that runs on it
    signature = ECDSA, SHA-384, over request || response, by that key
    nonce of the request = SHA-256("obfuscatune gpu 1" || 0x00 || report data of the CPU's quote)

Both bind the same claims, so both speak of the same TLS key and the same moment. That the GPU is the one that this
machine uses is the word of the driver in it, which the CPU's measurement must cover. Revocation is not judged: NVIDIA
publishes it by OCSP alone. Versions and measurements are judged by the policy's reference (`gpu_reference`).
"""

import hashlib
from collections.abc import Mapping

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384

from obfuscatune.errors import FormatError
from obfuscatune.parties.attestation.certificates import Certificate, p384_chain_problem, read_chain
from obfuscatune.parties.attestation.fields import parsing
from obfuscatune.parties.attestation.gpu_reference import GpuReference
from obfuscatune.parties.attestation.gpu_report import DIGEST_BYTES, GpuReport, parse
from obfuscatune.parties.attestation.policy import Policy
from obfuscatune.parties.attestation.roots import NVIDIA_DEVICE_ROOT
from obfuscatune.parties.attestation.verdict import Rule

REPORT, CERTIFICATES = "gpu_report", "gpu_certificates"
EXTRAS = (REPORT, CERTIFICATES)
_DOMAIN = b"obfuscatune gpu 1\0"
_FIRMWARE_ID = "2.23.133.5.4.1"  # TCG DICE TcbInfo; the digest of the firmware ends it
_LEAST_CHAIN = 3


def gpu_nonce(report_data: bytes) -> bytes:
    """Return the nonce that binds a GPU's report to ``report_data``, 32 bytes: the equation at the module's head."""
    return hashlib.sha256(_DOMAIN + report_data).digest()


def judge_gpu(
    extras: Mapping[str, bytes], policy: Policy, now: float, nonce: bytes | None = None
) -> tuple[list[Rule], bool]:
    """Return the rules on a GPU's report, at Unix second ``now``, and whether it is a simulated one. Never raises.

    Args:
        extras: of the evidence. nonce: that the report must be over; None: not judged.
    """
    if not any(name in extras for name in EXTRAS):
        wanted = policy.gpu is not None
        return ([Rule("gpu", False, "none", "a report of the machine's GPU")] if wanted else []), False
    try:
        with parsing("evidence of a GPU"):
            return _check(extras, policy, now, nonce)
    except FormatError as error:
        got = error.what if error.got is None else f"{error.what}: {error.got}"
        return [Rule("gpu format", False, got, "" if error.expected is None else str(error.expected))], False


def _check(extras: Mapping[str, bytes], policy: Policy, now: float, nonce: bytes | None) -> tuple[list[Rule], bool]:
    report = parse(extras.get(REPORT, b""))
    if not extras.get(CERTIFICATES):
        wanted = "the chain from the GPU's key to NVIDIA's root"
        return [Rule("gpu chain", False, "none comes with the report", wanted)], False
    chain = read_chain(extras[CERTIFICATES], "certificates of a GPU")
    leaf, root = chain[0], chain[-1].der
    genuine = hashlib.sha256(root).hexdigest() == NVIDIA_DEVICE_ROOT
    simulation = not genuine and policy.allow_simulation and root in policy.simulation_roots
    problem = p384_chain_problem(chain[::-1], now) if len(chain) >= _LEAST_CHAIN else "a chain that is too short"
    if not genuine and not simulation:
        problem = "certificates under another root"
    under = "under the simulation's root" if simulation else "under NVIDIA's root"
    expected = "NVIDIA's root" + (", or the policy's for simulation" if policy.allow_simulation else "")
    rules = [Rule("gpu chain", not problem, problem or under, expected)]
    signed, same = _signed(report, leaf), report.firmware_id == _firmware_id(leaf)
    rules += [
        Rule("gpu signature", signed, "genuine" if signed else "not by this certificate's key", "genuine"),
        Rule("gpu firmware", same, "the certificate's" if same else "another", "that of the certificate"),
    ]
    if not all(rule.passed for rule in rules):
        return rules, simulation
    over = None if nonce is None else report.nonce == nonce
    got = "none to compare with" if over is None else "over these claims" if over else "over something else"
    rules.append(Rule("gpu nonce", over, got, "over these claims"))
    return rules + _judge(report, policy.gpu), simulation


def _judge(report: GpuReport, reference: GpuReference | None) -> list[Rule]:
    if reference is None:
        return [Rule("gpu state", None, f"driver {report.driver}, VBIOS {report.vbios}", "a reference, [gpu]")]
    rules = []
    for name, got, allowed in (("driver", report.driver, reference.driver), ("vbios", report.vbios, reference.vbios)):
        rules.append(Rule(f"gpu {name}", got in allowed, got, " or ".join(allowed)))
    differ = []
    for index, values in reference.measurements.items():
        value = report.measurements.get(index)
        if value is None or value.hex() not in values:
            differ.append(str(index))
    got = f"others in {', '.join(differ)}" if differ else f"{len(reference.measurements)} as the reference has them"
    return [*rules, Rule("gpu values", not differ, got, "those of the reference")]


def _firmware_id(leaf: Certificate) -> bytes:
    value = getattr(leaf.extensions.get(_FIRMWARE_ID), "value", b"")
    return value[-DIGEST_BYTES:] if isinstance(value, bytes) else b""


def _signed(report: GpuReport, leaf: Certificate) -> bool:
    if not isinstance(leaf.key, EllipticCurvePublicKey):
        return False
    half = len(report.signature) // 2
    r, s = (int.from_bytes(part, "big") for part in (report.signature[:half], report.signature[half:]))
    try:
        leaf.key.verify(encode_dss_signature(r, s), report.signed, ECDSA(SHA384()))
    except InvalidSignature:
        return False
    return True
