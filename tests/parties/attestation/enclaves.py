"""An enclave on a simulated platform, as a verifier meets it."""

import time
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from obfuscatune.parties.attestation.claims import EnclaveClaims
from obfuscatune.parties.attestation.evidence import Evidence, attest
from obfuscatune.parties.attestation.policy import Policy
from obfuscatune.parties.attestation.simulator import SimulatedPlatform
from obfuscatune.parties.identity import Identity

NONCE, TLS_KEY = "ab" * 32, "cd" * 32
ENCLAVE = Identity.generate("enclave")
MIN_TCB = {"bootloader": 3, "tee": 0, "snp": 8, "microcode": 115}


def claims(**changes) -> EnclaveClaims:
    fields = {"identity": ENCLAVE.public, "tls_key": TLS_KEY, "nonce": NONCE, "issued": int(time.time())}
    return EnclaveClaims(**{**fields, "version": "0.1.0", **changes})


def evidence(platform: SimulatedPlatform, **changes) -> Evidence:
    return attest(platform.attester, claims(**changes).to_dict())


def root(platform: SimulatedPlatform) -> bytes:
    return x509.load_pem_x509_certificate(Path(platform.root).read_bytes()).public_bytes(Encoding.DER)


def policy(platform: SimulatedPlatform, **changes) -> Policy:
    """A policy for the simulation of this platform, with this program's measurements."""
    fields = {
        "measurements": {name: frozenset({value}) for name, value in platform.measurements().items()},
        "allow_simulation": True,
        "simulation_roots": (root(platform),),
        "allow_smt": True,
        "min_tcb": MIN_TCB,
    }
    return Policy(**{"kinds": (platform.kind,), **fields, **changes})
