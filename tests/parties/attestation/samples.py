"""Real evidence of public samples (../shared/attestation, see its README); tests that need it are skipped without."""

import functools
import pathlib

import pytest

from obfuscatune.parties.attestation.certificates import to_pem
from obfuscatune.parties.attestation.evidence import Quote
from obfuscatune.parties.attestation.policy import TCB_STATUSES, Policy

FOLDER = pathlib.Path(__file__).parents[3] / ".." / "shared" / "attestation"
needs_samples = pytest.mark.skipif(not FOLDER.is_dir(), reason="the samples of ../shared/attestation are not here")

SGX_TIME, TDX_TIME, SNP_TIME = 1750334171, 1750331763, 1750000000
INTEL_OPTIONS = {"allow_dynamic_platform": True, "allow_cached_keys": True, "allow_smt": True}
# The weakest policies that each sample passes: a refusal under them has the cause that a test gives it.
SGX_POLICY = Policy(("sgx",), tcb_status=TCB_STATUSES, advisories=("INTEL-SA-00289", "INTEL-SA-00615"), **INTEL_OPTIONS)
TDX_POLICY = Policy(("tdx",), **INTEL_OPTIONS)
SNP_POLICY = Policy(("snp",), allow_smt=True, min_tcb={"bootloader": 2, "tee": 0, "snp": 5, "microcode": 68})
DEBUG_POLICY = Policy(("snp",), allow_smt=True, min_tcb=SNP_POLICY.min_tcb, allow_debug=True)


@functools.cache
def load(name: str) -> bytes:
    return (FOLDER / name).read_bytes()


def dcap(kind: str) -> Quote:
    return Quote(kind, load(f"dcap/{kind}_quote"), {"collateral": load(f"dcap/{kind}_quote_collateral.json")})


def google() -> Quote:
    chain = to_pem(load("snp/goog_vcek.testcer")) + load("snp/goog_ask_ark_milan.pem")
    return Quote("snp", load("snp/goog_attestation.bin"), {"certificates": chain})


def virtee(product: str = "milan") -> Quote:
    """The Milan report, with the chain of its own product or of another."""
    chain = to_pem(load(f"snp/virtee_vcek_{product}.der")) + load(f"snp/virtee_cert_chain_{product}")
    return Quote("snp", bytes.fromhex(load("snp/virtee_report_milan.hex").decode().strip()), {"certificates": chain})


def changed(quote: Quote, at: int, xor: int = 1) -> Quote:
    raw = bytearray(quote.quote)
    raw[at] ^= xor
    return Quote(quote.kind, bytes(raw), quote.extras)


def with_extra(quote: Quote, name: str, data: bytes) -> Quote:
    return Quote(quote.kind, quote.quote, {**quote.extras, name: data})


def rules(verdict) -> dict[str, bool | None]:
    return {rule.name: rule.passed for rule in verdict.rules}


def failed(verdict) -> list[str]:
    return [rule.name for rule in verdict.failed]
