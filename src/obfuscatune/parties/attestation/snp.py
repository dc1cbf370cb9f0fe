"""SEV-SNP: a report under AMD's certificates, verified here on `cryptography`, and its platform judged by the policy.

    ARK (self-signed, RSA-4096, known by its hash) -> ASK -> VCEK, the chip's key, P-384
                                                   -> ASVK -> VLEK, a provider's key for all its chips, P-384
    RSA-PSS, SHA-384, salt of 48; the report by ECDSA, SHA-384, over its bytes [0 : 0x2A0]

Formats: AMD SEV-SNP Firmware ABI (56860), table ATTESTATION_REPORT; AMD VCEK certificate and KDS interface (57230).
A VLEK is accepted of the providers that the policy names: whoever has it can sign for any chip of that product.
AMD's revocation list, which the ARK signs, names ASKs and ASVKs. It is judged where the policy has one: nothing in a
report says how fresh it must be.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP384R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.padding import MGF1, PSS
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384

from obfuscatune.errors import FormatError, printable
from obfuscatune.parties.attestation.certificates import Certificate, read_chain
from obfuscatune.parties.attestation.evidence import Quote
from obfuscatune.parties.attestation.fields import parsing
from obfuscatune.parties.attestation.policy import Policy
from obfuscatune.parties.attestation.roots import AMD_ROOTS
from obfuscatune.parties.attestation.verdict import Checked, Rule

REPORT_BYTES = 0x4A0
_CHIP = slice(0x1A0, 0x1E0)
_SIGNED_BYTES, _SCALAR_BYTES, _SIGNATURE_END = 0x2A0, 72, 0x330
_VERSIONS = range(2, 6)
_ECDSA_P384_SHA384 = 1
_POLICY_MIGRATION, _POLICY_DEBUG = 1 << 18, 1 << 19
_PLATFORM_SMT, _PLATFORM_ALIAS_CHECK = 1 << 0, 1 << 5
_ALIAS_CHECK_VERSION = 3  # of reports, since which the bit means this
_SIGNED_BY = {0: "VCEK", 1: "VLEK"}
_RSA_BITS = 4096
_OID = "1.3.6.1.4.1.3704.1"
_PRODUCT_NAME, _HARDWARE_ID, _PROVIDER_ID = f"{_OID}.2", f"{_OID}.4", f"{_OID}.5"
_TCB_OIDS = {"bootloader": f"{_OID}.3.1", "tee": f"{_OID}.3.2", "snp": f"{_OID}.3.3", "microcode": f"{_OID}.3.8"}
# Bytes of a TCB_VERSION by product; Turin's first one, of another firmware, is in its VCEK too.
_TCB_LAYOUT = {
    "Milan": {"bootloader": 0, "tee": 1, "snp": 6, "microcode": 7},
    "Genoa": {"bootloader": 0, "tee": 1, "snp": 6, "microcode": 7},
    "Turin": {"fmc": 0, "bootloader": 1, "tee": 2, "snp": 3, "microcode": 7},
}
# Products without authorities of their own: their VCEKs, and their TCB versions, are as those of another one (57230).
_UNDER = {"Bergamo": "Genoa", "Siena": "Genoa"}
_FMC_OID = f"{_OID}.3.9"
_MEASUREMENTS = {
    **{"measurement": (0x90, 48), "host_data": (0xC0, 32), "id_key_digest": (0xE0, 48)},
    **{"author_key_digest": (0x110, 48), "family_id": (0x10, 16), "image_id": (0x20, 16)},
}


def check(evidence_quote: Quote, policy: Policy, now: float) -> Checked:
    """Verify a report at Unix second ``now`` and judge its platform.

    Raises:
        FormatError: the report or the certificates break their format.
    """
    report = evidence_quote.quote
    _check_form(report)
    chain = _chain(report, evidence_quote.extras.get("certificates", b""), policy)
    leaf, _, root = chain
    product = _text(leaf, _PRODUCT_NAME).partition("-")[0]  # what may follow is the stepping
    product = _UNDER.get(product, product)
    genuine = AMD_ROOTS.get(hashlib.sha256(root.der).hexdigest())
    simulation = genuine is None and policy.allow_simulation and root.der in policy.simulation_roots
    expected = "AMD's root" + (", or the policy's for simulation" if policy.allow_simulation else "")
    under = "under the simulation's root" if simulation else "under AMD's root"
    problem = _chain_problem(chain, now) or _names_problem(chain, _signing_key(report), product)
    if genuine is None and not simulation:
        problem = "certificates under another root"
    elif genuine is not None and genuine != product:
        problem = f"a {product} certificate under the root of {genuine}"
    elif product not in _TCB_LAYOUT:
        problem = "certificate of an unknown product"
    rules = [Rule("certificates", not problem, problem or under, expected)]
    signed = _signed_by(report, leaf)
    rules.append(Rule("signature", signed, "genuine" if signed else "not by this certificate's key", "genuine"))
    if problem or not signed:
        return Checked(rules)
    if policy.amd_crl is not None:
        rules.append(_revoked(policy.amd_crl, chain, now))
    rules.append(_chip(report, leaf, product))
    if _signing_key(report) == "VLEK":
        rules.append(_provider(leaf, policy))
    rules += _platform(report, policy, product)
    return Checked(rules, report[0x50:0x90], {**_measurements(report), **_guest_svn(report)}, simulation)


def peek(report: bytes) -> dict[str, str]:
    """Return measurements and report data of a report, NOT verified; raises FormatError where it is none."""
    _check_form(report)
    return {**_measurements(report), **_guest_svn(report), "report data": report[0x50:0x90].hex()}


def _check_form(report: bytes) -> None:
    if len(report) != REPORT_BYTES:
        raise FormatError("not an SNP report", got=f"{len(report)} bytes", expected=REPORT_BYTES)
    version, algorithm = _number(report, 0, 4), _number(report, 0x34, 4)
    if version not in _VERSIONS or algorithm != _ECDSA_P384_SHA384:
        raise FormatError("SNP report of an unknown version", got=f"version {version}, algorithm {algorithm}")
    if any(report[_SIGNATURE_END:]):  # not signed
        raise FormatError("bytes behind the report's signature")


def _chain(report: bytes, pem: bytes, policy: Policy) -> list[Certificate]:
    """Return VCEK or VLEK, ASK and ARK: the evidence's; what a host has not handed out comes from the policy."""
    chain = read_chain(pem, "certificates") if pem else []
    if len(chain) < 3 and policy.certificates is not None:
        *leaves, ask, ark = read_chain(policy.certificates, "certificates of the policy")
        key, chip = _signing_key(report), report[_CHIP]
        own = [leaf for leaf in leaves if (_is_for(leaf, chip) if key == "VCEK" else _title(leaf) == f"SEV-{key}")]
        own.sort(key=lambda leaf: not _signed_by(report, leaf))  # a chip has another VCEK for each TCB
        chain = [*(chain[:1] or own[:1] or leaves[:1]), ask, ark]
    if len(chain) != 3:
        hint = "the host hands out none: name them in the policy, platform.certificates"
        raise FormatError("certificates of a report", got=len(chain), expected=f"VCEK or VLEK, ASK, ARK; {hint}")
    return chain


def _revoked(pem: bytes, chain: list[Certificate], now: float) -> Rule:
    """Judge the ASK by AMD's list, which the ARK must have signed, and which must be of that time."""
    _, ask, root = chain
    with parsing("AMD's revocation list"):
        crl = x509.load_pem_x509_crl(pem) if pem.startswith(b"-----BEGIN") else x509.load_der_x509_crl(pem)
        issued, until = crl.last_update_utc, crl.next_update_utc
        entry = crl.get_revoked_certificate_by_serial_number(ask.fields.serial_number)
        signature, signed = crl.signature, crl.tbs_certlist_bytes
    problem = ""
    try:
        _rsa(root).verify(signature, signed, PSS(MGF1(SHA384()), 48), SHA384())
    except InvalidSignature:
        problem = "a list that the ARK has not signed"
    if not problem and (until is None or not issued.timestamp() <= now <= until.timestamp()):
        problem = f"a list from {issued:%Y-%m-%d}" + (f" until {until:%Y-%m-%d}" if until else " without an end")
    if not problem and entry is not None:
        problem = "the ASK is revoked"
    expected = "a list of that time under the ARK, without the ASK"
    return Rule("revocation", not problem, problem or f"none, as of {issued:%Y-%m-%d}", expected)


def _rsa(certificate: Certificate) -> RSAPublicKey:
    if not isinstance(certificate.key, RSAPublicKey):
        raise FormatError("AMD's root has no RSA key")
    return certificate.key


def _chain_problem(chain: list[Certificate], now: float) -> str:
    """Return what is wrong with VCEK or VLEK, ASK and ARK, the last one signing itself."""
    for certificate, issuer in zip(chain, [*chain[1:], chain[-1]], strict=True):
        if certificate.fields.issuer != issuer.fields.subject:
            return "a certificate of another issuer"
        if not isinstance(issuer.key, RSAPublicKey) or issuer.key.key_size != _RSA_BITS:
            return "an issuer without an RSA-4096 key"
        try:
            issuer.key.verify(certificate.fields.signature, certificate.signed, PSS(MGF1(SHA384()), 48), SHA384())
        except InvalidSignature:
            return "a certificate that its issuer has not signed"
        if not certificate.valid_at(now):
            return f"a certificate outside its life, which ends {certificate.fields.not_valid_after_utc:%Y-%m-%d}"
    return ""


def _signed_by(report: bytes, leaf: Certificate) -> bool:
    if not isinstance(leaf.key, EllipticCurvePublicKey) or not isinstance(leaf.key.curve, SECP384R1):
        return False
    r = _number(report, _SIGNED_BYTES, _SCALAR_BYTES)
    s = _number(report, _SIGNED_BYTES + _SCALAR_BYTES, _SCALAR_BYTES)
    try:
        leaf.key.verify(encode_dss_signature(r, s), report[:_SIGNED_BYTES], ECDSA(SHA384()))
    except InvalidSignature:
        return False
    return True


def _signing_key(report: bytes) -> str:
    """Return which key the report says that it is signed by: VCEK, VLEK, or another number's name."""
    number = _number(report, 0x48, 4) >> 2 & 0b111
    return _SIGNED_BY.get(number, f"key {number}")


def _names_problem(chain: list[Certificate], key: str, product: str) -> str:
    """Return what is wrong with the names: AMD issues VCEKs under one authority of a product, VLEKs under another."""
    leaf, authority, _ = map(_title, chain)
    wanted = (f"SEV-{key}", f"SEV-VLEK-{product}" if key == "VLEK" else f"SEV-{product}")
    if (leaf, authority) == wanted:
        return ""
    return f"certificates of {printable(leaf)} under {printable(authority)}, for a report by a {key}"


def _is_for(leaf: Certificate, chip: bytes) -> bool:
    """Whether a VCEK is for this chip. Turin's identifier has eight bytes, and zeros follow it in the report."""
    hardware = _raw(leaf, _HARDWARE_ID)
    return len(hardware) >= 8 and hardware.ljust(len(chip), b"\0") == chip and any(chip)


def _chip(report: bytes, leaf: Certificate, product: str) -> Rule:
    """Judge that a VCEK is for this chip (a VLEK is for none), and either for the TCB that the report states."""
    key = _signing_key(report)
    fits = _is_for(leaf, report[_CHIP]) if key == "VCEK" else key == "VLEK" and not _raw(leaf, _HARDWARE_ID)
    oids = {**_TCB_OIDS, "fmc": _FMC_OID}
    stated = _tcb(report, 0x180, product)
    same = all(_integer(leaf, oids[part]) == value for part, value in stated.items())
    chip = "any chip" if key == "VLEK" else "its chip"
    got = f"{key}, " + (f"{chip} and TCB" if fits and same else "another TCB" if fits else "another chip")
    return Rule("chip", fits and same, got, "the chip and TCB of the certificate")


def _provider(leaf: Certificate, policy: Policy) -> Rule:
    """Judge whose VLEK it is: a provider's, who may sign with it for any chip of the product."""
    provider = _text(leaf, _PROVIDER_ID)
    expected = " or ".join(policy.vlek_providers) or "named by platform.vlek_providers"
    return Rule("provider", provider in policy.vlek_providers, f"VLEK of {provider}", expected)


def _platform(report: bytes, policy: Policy, product: str) -> list[Rule]:
    flags, vmpl = _number(report, 0x08, 8), _number(report, 0x30, 4)
    debug, migration = bool(flags & _POLICY_DEBUG), bool(flags & _POLICY_MIGRATION)
    smt = bool(_number(report, 0x40, 8) & _PLATFORM_SMT)
    minimum = policy.min_tcb
    rules = [
        Rule("debug", policy.allow_debug or not debug, "the host may debug the guest" if debug else "no", "no"),
        Rule("migration", not migration, "a migration agent may move the guest" if migration else "no", "no"),
        Rule("platform", policy.allow_smt or not smt, "SMT is on" if smt else "SMT is off", "allow_smt, or SMT off"),
        Rule("vmpl", vmpl <= policy.max_vmpl, str(vmpl), f"at most {policy.max_vmpl}"),
    ]
    if policy.require_alias_check:
        rules.append(_alias_check(report))
    # The firmware that runs now signs; the one that started the guest has measured it; and to the committed one the
    # host may go back while the guest runs, after this judgement.
    for name, at in (("tcb", 0x180), ("launch tcb", 0x1F0), ("committed tcb", 0x1E0)):
        tcb = _tcb(report, at, product)
        enough = minimum is not None and all(part in minimum and tcb[part] >= minimum[part] for part in tcb)
        least = "in the policy" if minimum is None else _tcb_text({part: minimum.get(part, "missing") for part in tcb})
        rules.append(Rule(name, enough, _tcb_text(tcb), f"min_tcb {least}"))
    return rules


def _alias_check(report: bytes) -> Rule:
    """Judge that the firmware has looked for memory of which two addresses are one (AMD-SB-3015, "BadRAM")."""
    told = _number(report, 0, 4) >= _ALIAS_CHECK_VERSION
    done = told and bool(_number(report, 0x40, 8) & _PLATFORM_ALIAS_CHECK)
    got = "done" if done else "not done" if told else f"not told in reports of version {_number(report, 0, 4)}"
    return Rule("alias check", done, got, "done, by the firmware")


def _tcb(report: bytes, at: int, product: str) -> dict[str, int]:
    return {part: report[at + offset] for part, offset in _TCB_LAYOUT[product].items()}


def _tcb_text(tcb: Mapping[str, Any]) -> str:
    return ", ".join(f"{part} {value}" for part, value in tcb.items())


def _measurements(report: bytes) -> dict[str, str]:
    return {name: report[at : at + size].hex() for name, (at, size) in _MEASUREMENTS.items()}


def _guest_svn(report: bytes) -> dict[str, str]:
    """Return the version that whoever signed the identity block gave the guest, a decimal number."""
    return {"guest_svn": str(_number(report, 0x04, 4))}


def _title(certificate: Certificate) -> str:
    """Return the common name's first word: AMD's have one, the simulator's are marked behind it."""
    names = certificate.fields.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return str(names[0].value).partition(" ")[0] if names else "?"


def _number(report: bytes, at: int, size: int) -> int:
    return int.from_bytes(report[at : at + size], "little")


def _raw(certificate: Certificate, oid: str) -> bytes:
    value = getattr(certificate.extensions.get(oid), "value", b"")
    return value if isinstance(value, bytes) else b""


def _integer(certificate: Certificate, oid: str) -> int | None:
    """Return a DER INTEGER from 0 to 255."""
    value = _raw(certificate, oid)
    if len(value) in (3, 4) and value[:2] == bytes([2, len(value) - 2]):
        return int.from_bytes(value[2:], "big")
    return None


def _text(certificate: Certificate, oid: str) -> str:
    """Return a DER IA5String, for a terminal too; "?" where it is none."""
    value = _raw(certificate, oid)
    text = value[2:].decode("ascii", "replace") if len(value) > 2 and value[:2] == bytes([0x16, len(value) - 2]) else ""
    return printable(text) or "?"
