"""A simulated GPU of NVIDIA: reports in the real format, under a root of the simulator's own. It protects nothing.

simulation-gpu-root.pem    certificate of the root, public: what a verifier's policy names to accept it
gpu.key                    private key of the root, PEM. Stands for NVIDIA's authority
"""

import hashlib
import os
import struct
import time
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    SECP384R1,
    EllipticCurvePrivateKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from obfuscatune.durable import write_private
from obfuscatune.errors import AttestationError, FormatError, UsageError
from obfuscatune.parties.attestation.gpu_report import NONCE_BYTES
from obfuscatune.parties.attestation.simulated_pki import ROOT_DAYS, Life, issue, pem
from obfuscatune.parties.files import read_small

ROOT_FILE, _KEY_FILE = "simulation-gpu-root.pem", "gpu.key"
DRIVER, VBIOS = "550.90.07", "96.00.9F.00.01"
_VBIOS_RAW = bytes.fromhex("009f009601000000")
_BLOCKS = 64
_FIRMWARE_ID = hashlib.sha384(b"obfuscatune simulated GPU firmware").digest()
# TcbInfo with [6] fwids, one FWID { SHA-384, digest }: the end of it is what a verifier reads.
_TCB_INFO = bytes.fromhex("3041a63f303d06096086480165030402020430") + _FIRMWARE_ID
_MAX_BYTES = 16 * 1024


class SimulatedGpu:
    """A GPU under the root of :meth:`open`; ``measurements``, by index from 1, replace its own, for tests."""

    simulated = True

    def __init__(
        self, root_key: EllipticCurvePrivateKey, root: x509.Certificate, measurements: dict[int, bytes] | None = None
    ) -> None:
        life = Life.around(time.time(), ROOT_DAYS)
        authority, self._key = generate_private_key(SECP384R1()), generate_private_key(SECP384R1())
        identity = issue("GPU Identity", authority.public_key(), root_key, root, life, depth=0)
        extensions = {"2.23.133.5.4.1": _TCB_INFO}
        leaf = issue("GPU GSP FMC", self._key.public_key(), authority, identity, life, extensions=extensions)
        self._chain = pem([leaf, identity, root])
        self._measurements = {index: hashlib.sha384(bytes([index])).digest() for index in range(1, _BLOCKS + 1)}
        self._measurements |= measurements or {}

    @classmethod
    def open(cls, directory: Path) -> "SimulatedGpu":
        """Return the GPU of a directory; one is made where there is none.

        Raises:
            UsageError: a file cannot be read or written, or is readable by others. FormatError: one is damaged.
        """
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if not (directory / _KEY_FILE).exists():
                key = generate_private_key(SECP384R1())
                life = Life.around(time.time(), ROOT_DAYS)
                made = issue("Simulated GPU Device Identity CA", key.public_key(), key, None, life, depth=1)
                (directory / ROOT_FILE).write_bytes(pem([made]))
                write_private(
                    directory / _KEY_FILE, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
                )
        except OSError as error:
            raise UsageError("cannot make a simulated GPU", got=error.strerror, where=str(directory)) from None
        secret = read_small(directory / _KEY_FILE, _MAX_BYTES, "simulated GPU", private=True)
        public = read_small(directory / ROOT_FILE, _MAX_BYTES, "simulated GPU's root")
        try:
            root_key, root = load_pem_private_key(secret, None), x509.load_pem_x509_certificate(public)
        except (ValueError, TypeError):
            root_key = None
        if not isinstance(root_key, EllipticCurvePrivateKey) or root.public_key() != root_key.public_key():
            raise FormatError("simulated GPU is damaged", where=str(directory))
        return cls(root_key, root)

    def report(self, nonce: bytes) -> tuple[bytes, bytes]:
        """Return a report over 32 bytes, and the chain of its key (PEM); raises AttestationError on another nonce."""
        if len(nonce) != NONCE_BYTES:
            raise AttestationError("nonce for a GPU", got=f"{len(nonce)} bytes", expected=NONCE_BYTES)
        blocks = b"".join(
            struct.pack("<BBHBH", index, 1, len(value) + 3, 1, len(value)) + value
            for index, value in sorted(self._measurements.items())
        )
        fields = {3: DRIVER.encode() + b"\0", 6: _VBIOS_RAW, 20: _FIRMWARE_ID}
        opaque = b"".join(struct.pack("<HH", kind, len(data)) + data for kind, data in fields.items())
        signed = bytes((0x11, 0xE0, 1, 0xFF)) + nonce + b"\0"
        signed += bytes((0x11, 0x60, 0, 0, len(self._measurements))) + len(blocks).to_bytes(3, "little") + blocks
        signed += os.urandom(NONCE_BYTES) + struct.pack("<H", len(opaque)) + opaque
        r, s = decode_dss_signature(self._key.sign(signed, ECDSA(SHA384())))
        return signed + r.to_bytes(48, "big") + s.to_bytes(48, "big"), self._chain
