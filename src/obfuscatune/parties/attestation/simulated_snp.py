"""Simulated SEV-SNP, in AMD's formats, under the simulator's root: a report with its VCEK, ASK and ARK.

For tests also with a VLEK and its ASVK, as clouds have them that keep their chips to themselves.

Layouts: AMD SEV Secure Nested Paging Firmware ABI, table ATTESTATION_REPORT (version 2, 1184 bytes); AMD Versioned Chip
Endorsement Key Certificate and KDS Interface Specification (extensions of the VCEK).
"""

import struct
import time
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP384R1
from cryptography.hazmat.primitives.asymmetric.ec import generate_private_key as generate_ec_key
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key as generate_rsa_key
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384

from obfuscatune.parties.attestation.evidence import Quote
from obfuscatune.parties.attestation.quoting import bound_quote, check_report_data
from obfuscatune.parties.attestation.simulated_pki import (
    IA5_STRING,
    ROOT_DAYS,
    Flaws,
    Life,
    der,
    der_integer,
    issue,
    pem,
)

CHIP_ID_BYTES = 64
PRODUCT = "Milan-B0"  # whose layout of the TCB version the report has
CURRENT_TCB = {"bootloader": 4, "tee": 0, "snp": 23, "microcode": 213}
OUTDATED_TCB = {"bootloader": 2, "tee": 0, "snp": 5, "microcode": 40}
_CERTIFICATE_DAYS = 7 * 365
_OID = "1.3.6.1.4.1.3704.1"
_SPL_OIDS = {"bootloader": "3.1", "tee": "3.2", "snp": "3.3", "microcode": "3.8"}
_RESERVED_SPL_OIDS = ("3.4", "3.5", "3.6", "3.7")
_POLICY_RESERVED_ONE, _POLICY_DEBUG = 1 << 17, 1 << 19  # and no SMT
_ECDSA_P384_SHA384 = 1
_SIGNED_BY_VLEK = 1 << 2
_FIRMWARE_BUILD = bytes([21, 55, 1, 0])  # build, minor, major
_RSA_BITS = 4096


def new_keys() -> dict[str, Any]:
    """Return the keys of a new platform: its root (ARK), ASK and VCEK. Secret. Seconds for the RSA keys."""
    ark, ask = (generate_rsa_key(public_exponent=65537, key_size=_RSA_BITS) for _ in range(2))
    return {"root": ark, "ask": ask, "vcek": generate_ec_key(SECP384R1())}


def new_root(root_key: Any) -> x509.Certificate:
    """Return the certificate of the ARK."""
    return issue("ARK-Milan", root_key.public_key(), root_key, None, Life.around(time.time(), ROOT_DAYS), depth=1)


class SimulatedSnp:
    """An SEV-SNP guest with its secure processor.

    Args:
        keys: of :func:`new_keys`. Secret. root: the certificate of the first. measurement: 48 bytes.
        chip_id: 64 bytes. flaws: what is wrong with it; expired collateral is an expired VCEK here.
        provider: whose VLEK signs in place of the chip's VCEK, with the same keys; "": nobody's.
    """

    def __init__(
        self,
        keys: dict[str, Any],
        root: x509.Certificate,
        measurement: bytes,
        chip_id: bytes,
        flaws: Flaws,
        provider: str = "",
    ) -> None:
        self._vcek_key, self._measurement, self._chip_id, self._debug = keys["vcek"], measurement, chip_id, flaws.debug
        self._tcb = OUTDATED_TCB if flaws.outdated_tcb else CURRENT_TCB
        age = 2 * _CERTIFICATE_DAYS * 86_400 if flaws.expired_collateral else 0
        life = Life.around(time.time() - age, _CERTIFICATE_DAYS)
        ask_life = Life.around(time.time() - age, ROOT_DAYS + age // 86_400)
        self._signing_key = _SIGNED_BY_VLEK if provider else 0
        titles = ("SEV-VLEK", "SEV-VLEK-Milan") if provider else ("SEV-VCEK", "SEV-Milan")
        ask = issue(titles[1], keys["ask"].public_key(), keys["root"], root, ask_life, depth=0)
        extensions = _extensions(self._tcb, chip_id, provider)
        leaf = issue(titles[0], self._vcek_key.public_key(), keys["ask"], ask, life, extensions=extensions)
        self._chain = pem([leaf, ask, root])

    def quote(self, report_data: bytes) -> Quote:
        """Return a report over ``report_data`` with the certificates."""
        check_report_data(report_data)
        signed = self._report(report_data)
        r, s = decode_dss_signature(self._vcek_key.sign(signed, ECDSA(SHA384())))
        raw = signed + r.to_bytes(72, "little") + s.to_bytes(72, "little") + bytes(368)
        return bound_quote("snp", raw, report_data, {"certificates": self._chain})

    def _report(self, report_data: bytes) -> bytes:
        """Return the signed part, 0x2A0 bytes; no flags but whose key signs, no host data, no identity keys."""
        tcb = _tcb_version(self._tcb)
        policy = _POLICY_RESERVED_ONE | (_POLICY_DEBUG if self._debug else 0)
        head = struct.pack(
            "<IIQ32xII8sQI4x64s48s",
            *(2, 0, policy, 0, _ECDSA_P384_SHA384, tcb, 0, self._signing_key, report_data, self._measurement),
        )
        head += bytes(32 + 48 + 48 + 32) + b"\xff" * 32  # no migration agent
        tail = struct.pack("<8s24x64s8s4s4s8s168x", tcb, self._chip_id, tcb, _FIRMWARE_BUILD, _FIRMWARE_BUILD, tcb)
        return head + tail


def _tcb_version(tcb: dict[str, int]) -> bytes:
    """Return TCB_VERSION of Milan: boot loader, TEE, four reserved bytes, SNP, microcode."""
    return bytes([tcb["bootloader"], tcb["tee"], 0, 0, 0, 0, tcb["snp"], tcb["microcode"]])


def _extensions(tcb: dict[str, int], chip_id: bytes, provider: str) -> dict[str, bytes]:
    product = PRODUCT.partition("-")[0] if provider else PRODUCT  # a VLEK is for every stepping
    extensions = {f"{_OID}.1": der_integer(0), f"{_OID}.2": der(IA5_STRING, product.encode())}
    extensions |= {f"{_OID}.{oid}": der_integer(tcb[part]) for part, oid in _SPL_OIDS.items()}
    extensions |= {f"{_OID}.{oid}": der_integer(0) for oid in _RESERVED_SPL_OIDS}
    if provider:
        return extensions | {f"{_OID}.5": der(IA5_STRING, provider.encode())}
    return extensions | {f"{_OID}.4": chip_id}  # bare: AMD does not wrap it either
