"""Azure: the genuine report of its paravisor, and whole machines on a software TPM with simulated processors."""

import base64
import hashlib
import json
import random
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from obfuscatune.errors import AttestationError, FormatError, UsageError
from obfuscatune.parties.attestation import azure as module
from obfuscatune.parties.attestation import snp
from obfuscatune.parties.attestation.azure_vm import KEY_HANDLE, REPORT_INDEX, AzureAttester
from obfuscatune.parties.attestation.evidence import Evidence, Quote, attest
from obfuscatune.parties.attestation.platform import Platform, open_platform
from obfuscatune.parties.attestation.policy import Policy
from obfuscatune.parties.attestation.simulator import SimulatedPlatform
from obfuscatune.parties.attestation.tpm2_tools import Tools
from obfuscatune.parties.attestation.verify import _code, judge, judge_quote

from .enclaves import MIN_TCB, NONCE, TLS_KEY, claims, policy
from .samples import failed, load, needs_samples, rules, with_extra
from .swtpm import SoftwareTpm, new_tpm

TIME = 1_750_000_000
BOOTED = {f"pcr{n}": frozenset({"00" * 32}) for n in (4, 12, 13)}  # of a software TPM that nobody has booted with
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


def wrap(report: bytes, runtime: bytes, *, kind: int = 2, version: int = 2) -> bytes:
    """An HCL report as OpenHCL writes it; the genuine sample, of the paravisor before it, says version 1."""
    rest = struct.pack("<5I", len(runtime) + 20, 1, kind, 1, len(runtime)) + runtime
    size = 32 + len(report) + len(rest)
    return (b"HCLA" + struct.pack("<4I", version, size, 2, 0) + bytes(12) + report + rest).ljust(2600, b"\0")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("kind", [2, 4])
def test_reports_of_both_paravisors_are_read(kind: int, version: int) -> None:
    runtime = b'{"keys": []}'
    found = module.parse(wrap(b"\5" * 1184, runtime, kind=kind, version=version))
    assert (found.hardware, found.runtime) == ({2: "snp", 4: "tdx"}[kind], runtime)


@pytest.mark.parametrize(("version", "kind"), [(0, 2), (3, 2), (2, 1), (2, 3), (2, 5)])
def test_reports_of_unknown_versions_and_hardware_are_refused(version: int, kind: int) -> None:
    with pytest.raises(FormatError, match="HCL report"):
        module.parse(wrap(bytes(1184), b"{}", kind=kind, version=version))


def jwk(pem: bytes, **changes: Any) -> bytes:
    key: Any = load_pem_public_key(pem)
    numbers = key.public_numbers()
    modulus = base64.urlsafe_b64encode(numbers.n.to_bytes(256, "big")).rstrip(b"=").decode()
    fields = {"kid": "HCLAkPub", "key_ops": ["sign"], "kty": "RSA", "e": "AQAB", "n": modulus, **changes}
    return json.dumps({"keys": [fields], "vm-configuration": {"secure-boot": True}}).encode()


@contextmanager
def paravisor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, report_of: Any, kind: int) -> Iterator[SoftwareTpm]:
    """A TPM with what Azure's paravisor puts into it: its key, and the report of ``report_of(64 bytes)`` over that."""
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
        data = wrap(report_of(hashlib.sha256(runtime).digest() + bytes(32)), runtime, kind=kind)
        Path(blob).write_bytes(data[:2048])
        assert not any(data[2048:])
        tpm.run("tpm2_nvdefine", "-Q", "-C", "o", "-s", "2048", "-a", "ownerread|ownerwrite", REPORT_INDEX)
        tpm.run("tpm2_nvwrite", "-Q", "-C", "o", "-i", blob, REPORT_INDEX)
        yield tpm


@pytest.fixture
def machine(simulated_snp: SimulatedPlatform, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SoftwareTpm]:
    """A machine with SEV-SNP."""

    def report_of(report_data: bytes) -> bytes:
        return simulated_snp.attester.quote(report_data).quote

    with paravisor(monkeypatch, tmp_path, report_of, 2) as tpm:
        yield tpm


@pytest.fixture
def platform(machine: SoftwareTpm) -> Platform:
    return open_platform("azure")


def test_a_machine_from_the_processor_to_its_claims(
    platform: Platform, machine: Any, simulated_snp: SimulatedPlatform
) -> None:
    evidence = attest(platform.attester, claims().to_dict())
    assert Evidence.from_bytes(evidence.to_bytes()) == evidence
    measured = {n: frozenset({v}) for n, v in simulated_snp.measurements().items()}
    chain = simulated_snp.attester.quote(bytes(64)).extras["certificates"]
    changes = {"measurements": {**measured, **BOOTED}, "certificates": chain}
    accepting = policy(simulated_snp, kinds=("azure",), min_tcb=MIN_TCB, **changes)
    verdict = judge(evidence, accepting, nonce=NONCE, tls_key=TLS_KEY)
    assert verdict.accepted and verdict.simulation, str(verdict)
    assert platform.measurements()["pcr4"] == "00" * 32 and platform.sealing_key() and platform.counter is not None

    def refused(quote: Quote, **more: Any) -> list[str]:
        stricter = policy(simulated_snp, kinds=("azure",), min_tcb=MIN_TCB, **{**changes, **more})
        return failed(judge(Evidence(quote, evidence.claims), stricter, nonce=NONCE, tls_key=TLS_KEY))

    quote = evidence.quote
    assert refused(quote, measurements=BOOTED)[0] == "measurements"  # PCRs of whatever paravisor
    started = {**measured, **{f"pcr{n}": frozenset({"00" * 32}) for n in (9, 11)}}
    assert refused(quote, measurements=started) == ["measurements"]  # which whatever was booted can set
    signed = {**BOOTED, "id_key_digest": frozenset({"00" * 48})}
    assert refused(quote, measurements=signed) == ["measurements"]  # all that this signer ever signed
    assert refused(quote, measurements=signed, guest_svn=0) == []
    assert refused(quote, measurements=signed, guest_svn=1) == ["guest_svn"]
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


# TDX: the report is traded for a quote at the metadata service


def td_report(report_data: bytes) -> bytes:
    """A TD report in the room for a report: its report data, and what only the processor could check."""
    return (b"\x81" + b"\x5a" * 127 + report_data).ljust(1024, b"\x5a").ljust(1184, b"\0")


class MetadataService(BaseHTTPRequestHandler):
    """What answers at the cloud's link-local address; ``answer`` makes status and body of a TD report."""

    answer: ClassVar[Any] = None
    asked: ClassVar[list[bytes]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert (self.path, self.headers["Metadata"], set(body)) == ("/acc/tdquote", "true", {"report"})
        report = base64.urlsafe_b64decode(body["report"] + "==")
        self.asked.append(report)
        status, data = type(self).answer(report)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Nothing."""


def in_json(quote: bytes) -> bytes:
    return json.dumps({"quote": base64.urlsafe_b64encode(quote).rstrip(b"=").decode()}).encode()


@pytest.fixture
def service(simulated_tdx: SimulatedPlatform) -> Iterator[tuple[str, int]]:
    server = HTTPServer(("127.0.0.1", 0), MetadataService)
    MetadataService.answer = lambda report: (200, in_json(simulated_tdx.attester.quote(report[128:192]).quote))
    MetadataService.asked = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield "127.0.0.1", server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def td(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, service: tuple[str, int]) -> Iterator[AzureAttester]:
    with paravisor(monkeypatch, tmp_path, td_report, 4):
        yield AzureAttester(Tools(), service)


def corruptions(quote: Quote, count: int) -> Iterator[Quote]:
    """The quote with one bit changed, in one of its parts after the other."""
    generator, names = random.Random(5), ["", *sorted(quote.extras)]
    for number in range(count):
        name = names[number % len(names)]
        data = bytearray(quote.extras[name] if name else quote.quote)
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        yield with_extra(quote, name, bytes(data)) if name else Quote("azure", bytes(data), quote.extras)


def test_a_td_from_the_processor_to_its_claims(td: AzureAttester, simulated_tdx: SimulatedPlatform) -> None:
    evidence = attest(td, claims().to_dict())
    again = attest(td, claims().to_dict()).quote
    assert len(MetadataService.asked) == 1 and again.extras["td_quote"] == evidence.quote.extras["td_quote"]
    assert not any(evidence.quote.quote[32 : 32 + 1184])
    collateral = simulated_tdx.attester.quote(bytes(64)).extras["collateral"].decode()
    pinned = {"mrtd": frozenset({simulated_tdx.measurements()["mrtd"]}), **BOOTED}
    changes = {"measurements": pinned, "collateral": collateral}
    accepting = policy(simulated_tdx, kinds=("azure",), min_tcb=None, **changes)
    verdict = judge(evidence, accepting, nonce=NONCE, tls_key=TLS_KEY)
    assert verdict.accepted and verdict.simulation, str(verdict)
    assert verdict.measurements["rtmr1"] == "00" * 48

    def refused(quote: Quote, **more: Any) -> list[str]:
        stricter = replace(accepting, **more)
        return failed(judge(Evidence(quote, evidence.claims), stricter, nonce=NONCE, tls_key=TLS_KEY))

    quote = evidence.quote
    assert refused(quote, collateral=None) == ["collateral", "runtime data", "claims"]
    assert refused(quote, allow_simulation=False, simulation_roots=())[0] == "signature"
    assert refused(quote, measurements={**changes["measurements"], "mrtd": frozenset({"11" * 48})}) == ["mrtd"]
    # Pinned as a machine of SEV-SNP: a TD has no such measurement.
    assert refused(quote, measurements={"measurement": frozenset({"11" * 48}), **BOOTED}) == ["measurement"]
    assert refused(quote, guest_svn=0) == ["guest_svn"]  # nor such a version
    other = simulated_tdx.attester.quote(bytes(64)).quote  # of the same processor, over another machine's data
    assert refused(with_extra(quote, "td_quote", other)) == ["runtime data", "claims"]
    bare = {name: data for name, data in quote.extras.items() if name != "td_quote"}
    assert refused(Quote("azure", quote.quote, bare))[0] == "td quote"
    kept = quote.quote[:32] + td_report(bytes(64)) + quote.quote[32 + 1184 :]
    assert refused(Quote("azure", kept, quote.extras))[0] == "format"
    for changed in corruptions(quote, 50):
        assert refused(changed)


@pytest.mark.slow
def test_corruptions_of_a_td_are_refused(td: AzureAttester, simulated_tdx: SimulatedPlatform) -> None:
    evidence = attest(td, claims().to_dict())
    collateral = simulated_tdx.attester.quote(bytes(64)).extras["collateral"].decode()
    pinned = {"mrtd": frozenset({simulated_tdx.measurements()["mrtd"]}), **BOOTED}
    accepting = policy(simulated_tdx, kinds=("azure",), measurements=pinned, collateral=collateral)
    assert judge(evidence, accepting, nonce=NONCE).accepted
    for changed in corruptions(evidence.quote, 1000):
        assert judge(Evidence(changed, evidence.claims), accepting, nonce=NONCE).failed


@pytest.mark.parametrize(
    "answer",
    [
        (429, b""),
        (200, b""),
        (200, b"[]"),
        (200, b'{"quote": 1}'),
        (200, b'{"quote": "&"}'),
        (200, in_json(b"no quote")),
        (200, b"[" * 100_000),
        (200, b"x" * 300_000),
    ],
    ids=["busy", "empty", "list", "number", "alphabet", "short", "deep", "long"],
)
def test_a_service_that_gives_no_quote(answer: tuple[int, bytes], td: AzureAttester) -> None:
    MetadataService.answer = lambda report: answer
    with pytest.raises(AttestationError, match="metadata service"):
        td.quote(bytes(64))


def test_a_service_that_gives_the_quote_of_another_td(td: AzureAttester, simulated_tdx: SimulatedPlatform) -> None:
    MetadataService.answer = lambda report: (200, in_json(simulated_tdx.attester.quote(bytes(64)).quote))
    with pytest.raises(AttestationError, match="not of this TD report"):
        td.quote(bytes(64))


def test_no_service_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as taken, paravisor(monkeypatch, tmp_path, td_report, 4):
        taken.bind(("127.0.0.1", 0))  # nobody listens
        with pytest.raises(AttestationError, match="ConnectionRefusedError"):
            AzureAttester(Tools(), taken.getsockname()).quote(bytes(64))


def test_a_policy_of_tds_alone_needs_no_tcb_of_amd(tmp_path: Path) -> None:
    def load(pins: str) -> Policy:
        (tmp_path / "policy.toml").write_text(f'[platform]\nkinds = ["azure"]\n[measurements]\n{pins}\n')
        return Policy.load(tmp_path / "policy.toml")

    pcr = "\n".join(f'pcr{n} = ["{"11" * 32}"]' for n in (4, 8, 9))
    assert load(f'{pcr}\nmrtd = ["{"11" * 48}"]').pins("azure")
    with pytest.raises(UsageError, match="min_tcb is missing"):
        load(f'{pcr}\nmeasurement = ["{"11" * 48}"]')
    with pytest.raises(UsageError, match="no measurement pins the code of azure"):
        load(f'mrtd = ["{"11" * 48}"]')


@needs_samples
def test_the_paravisors_version_is_judged_and_shown() -> None:
    """Of the genuine report, whose guest has version 5: who has signed it is not all that a policy can say."""
    digest = sample().quote[32 + 0xE0 : 32 + 0x110].hex()
    assert any(bytes.fromhex(digest)) and module.peek(sample().quote)["guest_svn"] == "5"
    pinned = {**BOOTED, "id_key_digest": frozenset({digest})}
    pcrs = {"pcr4": "none", "pcr12": "none", "pcr13": "none"}  # the sample is no quote of a TPM
    for least, held in ((4, True), (5, True), (6, False)):
        found = snp.check(Quote("snp", sample().quote[32 : 32 + 1184], sample().extras), WEAKEST, TIME)
        measured = replace(found, measurements={**found.measurements, **pcrs})
        rules_ = _code(sample(), measured, replace(WEAKEST, measurements=pinned, guest_svn=least))
        judged = {rule.name: rule.passed for rule in rules_}
        assert judged["id_key_digest"] and judged["guest_svn"] is held and "measurements" not in judged


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
