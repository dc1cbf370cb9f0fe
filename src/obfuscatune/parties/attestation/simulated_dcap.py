"""Simulated TDX: a DCAP quote v4 or v5 and its collateral, in Intel's formats, under the simulator's root.

What Intel's services and the quoting enclave do is done here: a PCK certificate with the SGX extensions, TCB info and
quoting enclave identity signed by a TCB signing key, revocation lists, and the quote over an attestation key that the
quoting enclave's report binds. Layouts: Intel TDX DCAP Quoting Library API, appendix A.3 (quotes v4, v5); Intel SGX
PCK Certificate and CRL Profile, chapter 1.5 (extensions); Intel PCS API v4 (the JSON texts).
"""

import hashlib
import json
import os
import struct
import time
from typing import Any, Literal

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from obfuscatune.parties.attestation.dcap_layout import TEE_TYPES
from obfuscatune.parties.attestation.evidence import Quote
from obfuscatune.parties.attestation.quoting import bound_quote, check_report_data
from obfuscatune.parties.attestation.simulated_pki import (
    BOOLEAN,
    ENUMERATED,
    OCTETS,
    ROOT_DAYS,
    SEQUENCE,
    Flaws,
    Life,
    der,
    der_integer,
    der_pair,
    issue,
    pem,
    revocations,
)

COLLATERAL_DAYS = 30  # as Intel's
ADVISORY = "INTEL-SA-00837"  # of the level that the simulator's outdated platform has
_CERTIFICATE_DAYS = 365
_FMSPC, _PCE_ID = b"SIMULA", b"\0\0"
_SGX_EXTENSIONS = "1.2.840.113741.1.13.1"
_CURRENT_SVN, _OUTDATED_SVN, _PCE_SVN = 2, 1, 11
_MODULE_SVN, _MODULE_VERSION = 3, 1
_QE_SVN, _QE_PRODUCT = 4, 2
_QE_ATTRIBUTES = bytes.fromhex("11000000000000000000000000000000")  # INIT and PROVISION_KEY; no DEBUG
_QE_SIGNER = hashlib.sha256(b"obfuscatune simulated quoting enclave").digest()
_TDX_MODULE = hashlib.sha384(b"obfuscatune simulated TDX module").digest()
_INTEL = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")  # vendor of the quoting enclave; verifiers know no other
_SEPT_VE_DISABLE, _DEBUG = 1 << 28, 1 << 0
_TD_15 = 3  # type of the body of a quote v5
_XFAM = bytes.fromhex("e702060000000000")


def new_keys() -> dict[str, EllipticCurvePrivateKey]:
    """Return the P-256 keys of a new platform: its root and its PCK. Secret."""
    return {"root": generate_private_key(SECP256R1()), "pck": generate_private_key(SECP256R1())}


def new_root(root_key: Any) -> x509.Certificate:
    """Return the root's certificate."""
    return issue(
        "Simulated SGX Root CA", root_key.public_key(), root_key, None, Life.around(time.time(), ROOT_DAYS), depth=1
    )


class SimulatedTdx:
    """A TDX guest with its quoting enclave.

    Args:
        keys: of :func:`new_keys`. Secret. root: the certificate of the first. mrtd: 48 bytes.
        platform_id: 16 bytes, the PPID. flaws: what is wrong with it.
        version: of its quotes, 4, or 5 with the body of a TD 1.5.
    """

    def __init__(
        self,
        keys: dict[str, Any],
        root: x509.Certificate,
        mrtd: bytes,
        platform_id: bytes,
        flaws: Flaws,
        version: Literal[4, 5] = 4,
    ) -> None:
        life = Life.around(time.time(), _CERTIFICATE_DAYS)
        self._root, self._root_key, self._mrtd, self._flaws = root, keys["root"], mrtd, flaws
        self._version = version
        self._ca_key, self._tcb_key, self._quoting_key = (generate_private_key(SECP256R1()) for _ in range(3))
        self._svn = _OUTDATED_SVN if flaws.outdated_tcb else _CURRENT_SVN
        self._ca = issue("PCK Platform CA", self._ca_key.public_key(), self._root_key, root, life, depth=0)
        extensions = {_SGX_EXTENSIONS: _sgx_extensions(platform_id, self._svn)}
        pck = issue("PCK Certificate", keys["pck"].public_key(), self._ca_key, self._ca, life, extensions=extensions)
        self._tcb_chain = pem([issue("TCB Signing", self._tcb_key.public_key(), self._root_key, root, life), root])
        self._certification = self._certify(keys["pck"], pem([pck, self._ca, root]))

    def quote(self, report_data: bytes) -> Quote:
        """Return a quote over ``report_data`` with collateral of this moment."""
        check_report_data(report_data)
        body = self._report(report_data)
        if self._version == 5:
            service = hashlib.sha384(b"a service TD").digest() if self._flaws.service_td else bytes(48)
            body += bytes([_MODULE_SVN, _MODULE_VERSION, self._svn]).ljust(16, b"\0") + service
            body = struct.pack("<HI", _TD_15, len(body)) + body
        signed = struct.pack("<HHIHH16s20x", self._version, 2, TEE_TYPES["tdx"], 0, 0, _INTEL) + body
        point = _point(self._quoting_key)
        data = _sign(self._quoting_key, signed) + point + struct.pack("<HI", 6, len(self._certification))
        data += self._certification
        raw = signed + struct.pack("<I", len(data)) + data
        return bound_quote("tdx", raw, report_data, {"collateral": json.dumps(self._collateral()).encode()})

    def _report(self, report_data: bytes) -> bytes:
        """Return the TD report, 584 bytes: our code is in MRTD, no event was extended into an RTMR."""
        attributes = _SEPT_VE_DISABLE | (_DEBUG if self._flaws.debug else 0)
        return struct.pack(
            "<16s48s48sQQ8s48s48s48s48s192s64s",
            bytes([_MODULE_SVN, _MODULE_VERSION, self._svn]),
            _TDX_MODULE,
            b"",  # signer of the module: zero, Intel
            0,
            attributes,
            _XFAM,
            self._mrtd,
            b"",
            b"",
            b"",
            b"",
            report_data,
        )

    def _certify(self, pck_key: EllipticCurvePrivateKey, chain: bytes) -> bytes:
        """Return the quoting enclave's certification: its report over the attestation key, signed by the PCK."""
        nonce = os.urandom(32)
        report = struct.pack(
            "<16s4s28x16s32s32x32s96xHH60x64s",
            bytes([self._svn] * 16),
            b"",
            _QE_ATTRIBUTES,
            hashlib.sha256(b"obfuscatune simulated quoting enclave code").digest(),
            _QE_SIGNER,
            _QE_PRODUCT,
            _QE_SVN,
            hashlib.sha256(_point(self._quoting_key) + nonce).digest(),
        )
        nested = struct.pack("<H", len(nonce)) + nonce + struct.pack("<HI", 5, len(chain)) + chain
        return report + _sign(pck_key, report) + nested

    def _collateral(self) -> dict[str, str]:
        """Return what dcap-qvl's ``QuoteCollateralV3.from_json`` takes."""
        age = 2 * COLLATERAL_DAYS * 86_400 if self._flaws.expired_collateral else 0
        life = Life.around(time.time() - age, COLLATERAL_DAYS)
        texts = {"tcb_info": _tcb_info(life), "qe_identity": _qe_identity(life)}
        chain = self._tcb_chain.decode()
        return {
            "pck_crl_issuer_chain": pem([self._ca, self._root]).decode(),
            "root_ca_crl": revocations(self._root, self._root_key, life).hex(),
            "pck_crl": revocations(self._ca, self._ca_key, life).hex(),
            "tcb_info_issuer_chain": chain,
            "qe_identity_issuer_chain": chain,
            **texts,
            **{f"{name}_signature": _sign(self._tcb_key, text.encode()).hex() for name, text in texts.items()},
        }


def _sgx_extensions(platform_id: bytes, svn: int) -> bytes:
    """Return the DER of the PCK's SGX extensions: PPID, TCB, PCE-ID, FMSPC, type, instance, configuration."""
    oid = _SGX_EXTENSIONS
    components = [der_pair(f"{oid}.2.{number}", der_integer(svn)) for number in range(1, 17)]
    components.append(der_pair(f"{oid}.2.17", der_integer(_PCE_SVN)))
    components.append(der_pair(f"{oid}.2.18", der(OCTETS, bytes([svn] * 16))))
    off = der(BOOLEAN, b"\0")
    fields = [
        der_pair(f"{oid}.1", der(OCTETS, platform_id)),
        der_pair(f"{oid}.2", der(SEQUENCE, b"".join(components))),
        der_pair(f"{oid}.3", der(OCTETS, _PCE_ID)),
        der_pair(f"{oid}.4", der(OCTETS, _FMSPC)),
        der_pair(f"{oid}.5", der(ENUMERATED, b"\1")),
        der_pair(f"{oid}.6", der(OCTETS, platform_id)),
        der_pair(f"{oid}.7", der(SEQUENCE, b"".join(der_pair(f"{oid}.7.{number}", off) for number in (1, 2, 3)))),
    ]
    return der(SEQUENCE, b"".join(fields))


def _tcb_info(life: Life) -> str:
    module = {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}
    good = {"tcb": {"isvsvn": _MODULE_SVN}, "tcbDate": "2026-01-01T00:00:00Z", "tcbStatus": "UpToDate"}
    fields = {
        "id": "TDX",
        "version": 3,
        **_dates(life),
        "fmspc": _FMSPC.hex().upper(),
        "pceId": _PCE_ID.hex(),
        "tcbType": 0,
        "tcbEvaluationDataNumber": 20,
        "tdxModule": module,
        "tdxModuleIdentities": [{"id": f"TDX_{_MODULE_VERSION:02}", **module, "tcbLevels": [good]}],
        "tcbLevels": [
            _level(_CURRENT_SVN, "2026-01-01T00:00:00Z", "UpToDate"),
            {**_level(_OUTDATED_SVN, "2024-01-01T00:00:00Z", "OutOfDate"), "advisoryIDs": [ADVISORY]},
        ],
    }
    return json.dumps(fields, separators=(",", ":"))


def _level(svn: int, date: str, status: str) -> dict[str, Any]:
    module = [_MODULE_SVN, _MODULE_VERSION, svn] + [0] * 13
    tcb = {
        "sgxtcbcomponents": [{"svn": svn}] * 16,
        "pcesvn": _PCE_SVN,
        "tdxtcbcomponents": [{"svn": number} for number in module],
    }
    return {"tcb": tcb, "tcbDate": date, "tcbStatus": status}


def _qe_identity(life: Life) -> str:
    fields = {
        "id": "TD_QE",
        "version": 2,
        **_dates(life),
        "tcbEvaluationDataNumber": 20,
        "miscselect": "00" * 4,
        "miscselectMask": "FF" * 4,
        "attributes": _QE_ATTRIBUTES.hex(),
        "attributesMask": "FBFFFFFFFFFFFFFF0000000000000000",
        "mrsigner": _QE_SIGNER.hex().upper(),
        "isvprodid": _QE_PRODUCT,
        "tcbLevels": [{"tcb": {"isvsvn": _QE_SVN}, "tcbDate": "2026-01-01T00:00:00Z", "tcbStatus": "UpToDate"}],
    }
    return json.dumps(fields, separators=(",", ":"))


def _dates(life: Life) -> dict[str, str]:
    return {name: f"{at:%Y-%m-%dT%H:%M:%SZ}" for name, at in (("issueDate", life.start), ("nextUpdate", life.end))}


def _point(key: EllipticCurvePrivateKey) -> bytes:
    """Return the public key as x || y, 64 bytes, big endian."""
    return key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)[1:]


def _sign(key: EllipticCurvePrivateKey, data: bytes) -> bytes:
    """Return r || s, 64 bytes, big endian, of ECDSA with SHA-256."""
    r, s = decode_dss_signature(key.sign(data, ECDSA(SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")
