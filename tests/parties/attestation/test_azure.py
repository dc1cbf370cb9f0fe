"""Azure: the genuine report of its paravisor, and a whole machine on a software TPM with a simulated processor."""

import base64
import hashlib
import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from obfuscatune.errors import AttestationError, FormatError
from obfuscatune.parties.attestation import azure as module
from obfuscatune.parties.attestation.azure_vm import KEY_HANDLE, REPORT_INDEX
from obfuscatune.parties.attestation.evidence import Evidence, Quote, attest
from obfuscatune.parties.attestation.platform import Platform, open_platform
from obfuscatune.parties.attestation.policy import Policy
from obfuscatune.parties.attestation.simulator import SimulatedPlatform
from obfuscatune.parties.attestation.verify import judge, judge_quote

from .enclaves import MIN_TCB, NONCE, TLS_KEY, claims, policy
from .samples import failed, load, needs_samples, rules, with_extra
from .swtpm import SoftwareTpm, new_tpm

TIME = 1_750_000_000
WEAKEST = Policy(("azure",), allow_smt=True, min_tcb={"bootloader": 3, "tee": 0, "snp": 8, "microcode": 115})


def sample() -> Quote:
    return Quote("azure", load("azure/hcl-report.bin"), {"certificates": load("azure/vcek.pem")})


@needs_samples
def test_the_sample_verifies() -> None:
    found = judge_quote(sample(), WEAKEST, now=TIME)
    assert not found.failed, str(found)
    assert rules(found)["runtime data"] is True and rules(found)["tpm quote"] is None and not found.accepted
    assert module.peek(sample().quote)["runtime data"] == "1110 bytes"
    bare = Quote("azure", sample().quote)  # the guest's TPM gives no certificates
    assert failed(judge_quote(bare, WEAKEST, now=TIME)) == ["format"]
    named = Policy(("azure",), allow_smt=True, min_tcb=WEAKEST.min_tcb, certificates=load("azure/vcek.pem"))
    assert not judge_quote(bare, named, now=TIME).failed


@needs_samples
@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_corruptions_of_the_sample_are_refused(count: int) -> None:
    report, generator = sample().quote, random.Random(11)
    for _ in range(count):
        changed = bytearray(report)
        changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
        assert judge_quote(Quote("azure", bytes(changed), sample().extras), WEAKEST, now=TIME).failed
    for size in (0, 4, 31, 32, 1216, 1236, 2345):
        assert failed(judge_quote(Quote("azure", report[:size], sample().extras), WEAKEST, now=TIME)) == ["format"]


def wrap(report: bytes, runtime: bytes, *, kind: int = 2) -> bytes:
    rest = struct.pack("<5I", len(runtime) + 20, 1, kind, 1, len(runtime)) + runtime
    size = 32 + len(report) + len(rest)
    return (b"HCLA" + struct.pack("<4I", 1, size, 2, 0) + bytes(12) + report + rest).ljust(2600, b"\0")


def jwk(pem: bytes, **changes: Any) -> bytes:
    key: Any = load_pem_public_key(pem)
    numbers = key.public_numbers()
    modulus = base64.urlsafe_b64encode(numbers.n.to_bytes(256, "big")).rstrip(b"=").decode()
    fields = {"kid": "HCLAkPub", "key_ops": ["sign"], "kty": "RSA", "e": "AQAB", "n": modulus, **changes}
    return json.dumps({"keys": [fields], "vm-configuration": {"secure-boot": True}}).encode()


def test_a_report_of_tdx_is_refused_by_name(simulated_snp: SimulatedPlatform) -> None:
    data = wrap(bytes(0x4A0), b"{}", kind=4)
    assert "of a TDX machine, which is not verified yet" in str(judge_quote(Quote("azure", data), WEAKEST))


@pytest.fixture
def machine(simulated_snp: SimulatedPlatform, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SoftwareTpm]:
    """A TPM with what Azure's paravisor puts into it."""
    with new_tpm() as tpm, tpm.running():
        monkeypatch.setenv("TPM2TOOLS_TCTI", tpm.tcti)
        context, key, blob = (str(tmp_path / name) for name in ("context", "key", "blob"))
        attributes = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|sign"
        tpm.run(
            *("tpm2_createprimary", "-Q", "-C", "e", "-g", "sha256", "-G", "rsa2048:rsassa-sha256:null"),
            *("-a", attributes, "-c", context),
        )
        tpm.run("tpm2_evictcontrol", "-Q", "-C", "o", "-c", context, KEY_HANDLE)
        tpm.run("tpm2_flushcontext", "--transient-object")
        tpm.run("tpm2_readpublic", "-Q", "-c", KEY_HANDLE, "-f", "pem", "-o", key)
        runtime = jwk(Path(key).read_bytes())
        quote = simulated_snp.attester.quote(hashlib.sha256(runtime).digest() + bytes(32))
        Path(blob).write_bytes(wrap(quote.quote, runtime)[:2048])
        assert not any(wrap(quote.quote, runtime)[2048:])
        tpm.run("tpm2_nvdefine", "-Q", "-C", "o", "-s", "2048", "-a", "ownerread|ownerwrite", REPORT_INDEX)
        tpm.run("tpm2_nvwrite", "-Q", "-C", "o", "-i", blob, REPORT_INDEX)
        tpm.chain = quote.extras["certificates"]  # type: ignore[attr-defined]
        yield tpm


@pytest.fixture
def platform(machine: SoftwareTpm) -> Platform:
    return open_platform("azure")


def test_a_machine_from_the_processor_to_its_claims(
    platform: Platform, machine: Any, simulated_snp: SimulatedPlatform
) -> None:
    evidence = attest(platform.attester, claims().to_dict())
    assert Evidence.from_bytes(evidence.to_bytes()) == evidence
    measured = {**simulated_snp.measurements(), "pcr4": "00" * 32}
    changes = {"measurements": {n: frozenset({v}) for n, v in measured.items()}, "certificates": machine.chain}
    accepting = policy(simulated_snp, kinds=("azure",), min_tcb=MIN_TCB, **changes)
    verdict = judge(evidence, accepting, nonce=NONCE, tls_key=TLS_KEY)
    assert verdict.accepted and verdict.simulation, str(verdict)
    assert platform.measurements()["pcr4"] == "00" * 32 and platform.sealing_key() and platform.counter is not None

    def refused(quote: Quote, **more: Any) -> list[str]:
        stricter = policy(simulated_snp, kinds=("azure",), min_tcb=MIN_TCB, **{**changes, **more})
        return failed(judge(Evidence(quote, evidence.claims), stricter, nonce=NONCE, tls_key=TLS_KEY))

    quote = evidence.quote
    only = {"pcr4": frozenset({"00" * 32})}
    assert refused(quote, measurements=only)[0] == "measurements"  # PCRs of whatever paravisor
    assert refused(quote, measurements={**changes["measurements"], "pcr4": frozenset({"01" * 32})}) == ["pcr4"]
    assert refused(quote, allow_simulation=False, simulation_roots=())[0] == "certificates"
    later = attest(platform.attester, claims(nonce="ef" * 32).to_dict()).quote
    assert refused(later) == ["claims"]  # a quote for another nonce
    generator = random.Random(3)
    for name in ("", "tpm_quote", "signature", "pcrs"):
        for _ in range(12):
            data = bytearray(quote.extras[name] if name else quote.quote)
            data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
            changed = with_extra(quote, name, bytes(data)) if name else Quote("azure", bytes(data), quote.extras)
            assert refused(changed)
    for name in ("tpm_quote", "signature", "pcrs"):
        part = {other: data for other, data in quote.extras.items() if other != name}
        assert refused(Quote("azure", quote.quote, part))[0] == "format"
    machine.extend(4)
    assert refused(attest(platform.attester, dict(evidence.claims)).quote) == ["pcr4"]


def test_a_tpm_without_a_report_is_no_machine_of_azure(monkeypatch: pytest.MonkeyPatch) -> None:
    with new_tpm() as tpm, tpm.running():
        monkeypatch.setenv("TPM2TOOLS_TCTI", tpm.tcti)
        with pytest.raises(AttestationError):
            open_platform("azure").attester.quote(bytes(64))


@pytest.mark.parametrize(
    "runtime",
    [
        b"",
        b"[]",
        b'{"keys": []}',
        b'{"keys": [{"kid": "HCLAkPub"}]}',
        b'{"keys": [{"kid": "HCLAkPub", "kty": "RSA", "key_ops": ["sign"], "e": "AQAB", "n": "AAAA"}]}',
        b"[" * 5000,
        b"\xff",
    ],
)
def test_runtime_data_without_a_key_are_refused(runtime: bytes) -> None:
    with pytest.raises(FormatError, match="key of the TPM"):
        module._attestation_key(runtime)
