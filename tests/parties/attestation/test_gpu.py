"""Evidence of NVIDIA GPUs: the genuine report, simulated ones beside a CPU's quote, and what is refused of both."""

import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from obfuscatune.errors import AttestationError, FormatError, UsageError
from obfuscatune.parties.attestation.certificates import read_chain
from obfuscatune.parties.attestation.evidence import Evidence, attest, report_data
from obfuscatune.parties.attestation.gpu import CERTIFICATES, REPORT, gpu_nonce
from obfuscatune.parties.attestation.gpu_machine import GpuPlatform, NvidiaGpu, open_gpu
from obfuscatune.parties.attestation.gpu_reference import read_reference, write_reference
from obfuscatune.parties.attestation.gpu_report import parse
from obfuscatune.parties.attestation.policy import Policy
from obfuscatune.parties.attestation.simulated_gpu import ROOT_FILE, SimulatedGpu
from obfuscatune.parties.attestation.simulator import SimulatedPlatform
from obfuscatune.parties.attestation.verdict import Verdict
from obfuscatune.parties.attestation.verify import judge, judge_gpu_report

from .enclaves import NONCE, TLS_KEY, claims, policy, root
from .samples import FOLDER, failed, load, needs_samples, rules

CHAIN = FOLDER / "nvidia" / "hopperCertChain.txt"
needs_chain = pytest.mark.skipif(
    FOLDER.is_dir() and not CHAIN.is_file(), reason="the chain of NVIDIA's sample is not in ../shared/attestation"
)


def sample() -> bytes:
    return bytes.fromhex(load("nvidia/hopperAttestationReport.txt").decode().strip())


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def gpu(directory: Path) -> SimulatedGpu:
    return SimulatedGpu.open(directory)


@pytest.fixture(scope="module")
def evidence(gpu: SimulatedGpu, simulated_tdx: SimulatedPlatform) -> Evidence:
    return attest(GpuPlatform(simulated_tdx, gpu).attester, claims().to_dict())


@pytest.fixture(scope="module")
def accepting(gpu: SimulatedGpu, directory: Path, simulated_tdx: SimulatedPlatform) -> Policy:
    gpu_root = read_chain((directory / ROOT_FILE).read_bytes(), "root")[0].der
    reference = read_reference(write_reference(parse(gpu.report(bytes(32))[0])))
    return policy(simulated_tdx, simulation_roots=(root(simulated_tdx), gpu_root), gpu=reference)


def verdict(evidence: Evidence, policy: Policy) -> Verdict:
    return judge(evidence, policy, nonce=NONCE, tls_key=TLS_KEY)


def with_extras(evidence: Evidence, **extras: bytes | None) -> Evidence:
    merged = {name: data for name, data in {**evidence.quote.extras, **extras}.items() if data is not None}
    return Evidence(replace(evidence.quote, extras=merged), evidence.claims)


def corruptions(extras: dict[str, bytes], count: int) -> Iterator[dict[str, bytes]]:
    """The extras of a GPU with one bit changed, in report and certificates by turns."""
    generator = random.Random(2)
    for number in range(count):
        name = (REPORT, CERTIFICATES)[number % 2]
        data = bytearray(extras[name])
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        yield {**extras, name: bytes(data)}


# The genuine report


@needs_samples
def test_the_sample_is_read_and_refused_for_want_of_its_chain() -> None:
    report = parse(sample())
    assert (report.driver, report.vbios, len(report.measurements)) == ("550.90.07", "96.00.9F.00.01", 64)
    assert report.nonce.hex().startswith("931d8dd0add203ac") and len(report.signed) == 4117 - 96
    found = judge_gpu_report({REPORT: sample()}, Policy(()))
    assert failed(found) == ["gpu chain"] and "none comes with the report" in str(found)


@needs_samples
@needs_chain
@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_sample_with_its_chain_verifies_and_corrupted_is_refused(count: int) -> None:
    extras = {REPORT: sample(), CERTIFICATES: load("nvidia/hopperCertChain.txt")}
    named = Policy((), gpu=read_reference(write_reference(parse(sample()))))
    found = judge_gpu_report(extras, named)
    assert not found.failed and not found.simulation and rules(found)["gpu values"] is True, str(found)
    for changed in corruptions(extras, count):
        assert judge_gpu_report(changed, named).failed


@needs_samples
def test_a_report_that_is_cut_or_longer_is_refused() -> None:
    data = sample()
    for size in (*range(0, len(data), 97), len(data) - 1):
        with pytest.raises(FormatError):
            parse(data[:size])
    for more in (b"\0", bytes(8192)):
        with pytest.raises(FormatError):
            parse(data + more)


# A simulated GPU beside a simulated processor


def test_processor_and_gpu_are_accepted_together(evidence: Evidence, accepting: Policy) -> None:
    found = verdict(Evidence.from_bytes(evidence.to_bytes()), accepting)
    assert found.accepted and found.simulation, str(found)
    assert [name for name, passed in rules(found).items() if name.startswith("gpu") and passed] == [
        *("gpu chain", "gpu signature", "gpu firmware", "gpu nonce", "gpu driver", "gpu vbios", "gpu values")
    ]
    # Who asks for no GPU is told what it is.
    assert rules(verdict(evidence, replace(accepting, gpu=None)))["gpu state"] is None


def test_what_is_refused_of_a_gpu(
    evidence: Evidence, accepting: Policy, gpu: SimulatedGpu, simulated_tdx: SimulatedPlatform, tmp_path: Path
) -> None:
    def refused(of: Evidence, policy: Policy = accepting) -> list[str]:
        return failed(verdict(of, policy))

    assert refused(with_extras(evidence, **{REPORT: None, CERTIFICATES: None})) == ["gpu"]
    assert refused(with_extras(evidence, **{CERTIFICATES: None})) == ["gpu chain"]
    assert refused(with_extras(evidence, **{REPORT: None})) == ["gpu format"]
    replayed = gpu.report(gpu_nonce(report_data(claims(nonce="cd" * 32).to_dict())))[0]
    assert refused(with_extras(evidence, **{REPORT: replayed})) == ["gpu nonce"]
    foreign = SimulatedGpu.open(tmp_path)  # another root
    assert refused(attest(GpuPlatform(simulated_tdx, foreign).attester, evidence.claims)) == ["gpu chain"]
    another = SimulatedGpu.open(Path(tmp_path)).report(gpu_nonce(report_data(evidence.claims)))[0]
    assert refused(with_extras(evidence, **{REPORT: another})) == ["gpu signature"]
    only_real = replace(accepting, simulation_roots=(root(simulated_tdx),))
    assert refused(evidence, only_real) == ["gpu chain"]
    reference = accepting.gpu
    assert reference is not None
    for changes, rule in (({"driver": ("1.0",)}, "gpu driver"), ({"vbios": ("96.00",)}, "gpu vbios")):
        assert refused(evidence, replace(accepting, gpu=replace(reference, **changes))) == [rule]
    for index in (9, 65):  # another value, and a block that the report does not have
        values = {**reference.measurements, index: frozenset({"00" * 48})}
        found = verdict(evidence, replace(accepting, gpu=replace(reference, measurements=values)))
        assert failed(found) == ["gpu values"] and f"others in {index}" in str(found)


def test_a_chain_that_ends_early_or_has_parts_left_out_is_refused(evidence: Evidence, accepting: Policy) -> None:
    leaf, authority, top = (
        part + b"-----END CERTIFICATE-----\n"
        for part in evidence.quote.extras[CERTIFICATES].split(b"-----END CERTIFICATE-----\n")[:3]
    )
    for chain in ([leaf, top], [leaf, authority], [top], [authority, leaf, top], [leaf, leaf, top]):
        assert failed(verdict(with_extras(evidence, **{CERTIFICATES: b"".join(chain)}), accepting))[0] == "gpu chain"


@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_corruptions_are_refused(count: int, evidence: Evidence, accepting: Policy) -> None:
    extras = {name: evidence.quote.extras[name] for name in (REPORT, CERTIFICATES)}
    bare = replace(accepting, kinds=())
    assert not judge_gpu_report(extras, bare).failed
    for changed in corruptions(extras, count):
        assert judge_gpu_report(changed, bare).failed


def test_a_damaged_simulation_is_said(directory: Path, tmp_path: Path, gpu: SimulatedGpu) -> None:
    again = open_gpu(f"simulation:{directory}")  # the same root after a restart
    assert read_chain(again.report(bytes(32))[1], "chain")[-1].der == read_chain(gpu.report(bytes(32))[1], "c")[-1].der
    SimulatedGpu.open(tmp_path / "other")
    (tmp_path / "other" / ROOT_FILE).write_bytes((directory / ROOT_FILE).read_bytes())
    with pytest.raises(FormatError, match="damaged"):
        SimulatedGpu.open(tmp_path / "other")
    with pytest.raises(UsageError, match="nvidia or simulation:DIR"):
        open_gpu("amd")


# The file of allowed values


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("driver = [", "not TOML"),
        ("", "driver: allows nothing; vbios: allows nothing; measurements: allows nothing"),
        (f'driver = ["1"]\nvbios = ["2"]\n[measurements]\n0 = ["{"0" * 96}"]', "measurements.0: unknown key"),
        ('driver = ["1"]\nvbios = ["2"]\n[measurements]\n2 = ["00"]', "96 hex digits"),
        ('driver = ["1"]\nvbios = ["2"]\n[measurements]\n2 = []', "measurements: allows nothing"),
        ('driver = "1"', "list of texts"),
    ],
)
def test_a_reference_that_pins_nothing_is_refused(text: str, fault: str) -> None:
    with pytest.raises(FormatError) as caught:
        read_reference(text)
    assert fault in str(caught.value)


def test_a_policy_names_its_reference(tmp_path: Path) -> None:
    pins = f'[platform]\nkinds = ["tdx"]\n[measurements]\nmrtd = ["{"11" * 48}"]\n'
    (tmp_path / "h100.toml").write_text(f'driver = ["1"]\nvbios = ["2"]\n[measurements]\n2 = ["{"AB" * 48}"]')
    (tmp_path / "policy.toml").write_text(pins + '[gpu]\nreference = "h100.toml"')
    loaded = Policy.load(tmp_path / "policy.toml").gpu
    assert loaded is not None and loaded.measurements == {2: frozenset({"ab" * 48})}
    for table in ("[gpu]", '[gpu]\nreference = "none.toml"', '[gpu]\nreference = "policy.toml"', "[gpu]\nx = 1"):
        (tmp_path / "policy.toml").write_text(f"{pins}{table}\n")
        with pytest.raises(UsageError, match="gpu"):
            Policy.load(tmp_path / "policy.toml")


# A GPU by NVML, which is not here: its interface as nvidia-ml-py has it


class NvmlError(Exception):
    """As pynvml's."""


class Nvml:
    """pynvml on a machine with one confidential GPU."""

    NVMLError = NvmlError

    def __init__(self, gpu: SimulatedGpu, *, count: int = 1, feature: int = 1, developer: int = 0) -> None:
        self.gpu, self.count, self.state = gpu, count, SimpleNamespace(ccFeature=feature, devToolsMode=developer)

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's names
        return

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlSystemGetConfComputeState(self) -> Any:  # noqa: N802
        return self.state

    def nvmlDeviceGetConfComputeGpuAttestationReport(self, device: int, nonce: bytes) -> Any:  # noqa: N802
        data = self.gpu.report(nonce)[0]
        return SimpleNamespace(attestationReport=list(data.ljust(0x2000, b"\0")), attestationReportSize=len(data))

    def nvmlDeviceGetConfComputeGpuCertificate(self, device: int) -> Any:  # noqa: N802
        data = self.gpu.report(bytes(32))[1] + b"\0"
        return SimpleNamespace(attestationCertChain=list(data.ljust(0x1400, b"\0")), attestationCertChainSize=len(data))


def test_a_gpu_is_asked_through_nvml(
    gpu: SimulatedGpu, accepting: Policy, simulated_tdx: SimulatedPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(gpu))  # type: ignore[arg-type]
    platform = GpuPlatform(simulated_tdx, open_gpu("nvidia"))
    assert platform.name == "simulated tdx with GPU" and platform.simulated
    assert platform.sealing_key() == simulated_tdx.sealing_key() and platform.counter is simulated_tdx.counter
    assert verdict(attest(platform.attester, claims().to_dict()), accepting).accepted


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"count": 0}, "GPUs of this machine"),
        ({"count": 8}, "GPUs of this machine"),
        ({"feature": 0}, "confidential computing is off"),
        ({"developer": 1}, "developer mode"),
    ],
)
def test_a_machine_without_one_confidential_gpu_is_refused(
    changes: dict[str, int], what: str, gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(gpu, **changes))  # type: ignore[arg-type]
    with pytest.raises(AttestationError, match=what):
        NvidiaGpu()


def test_no_library_an_old_one_or_no_driver_is_said(gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # type: ignore[arg-type]
    with pytest.raises(AttestationError, match="pynvml is not installed"):
        open_gpu("nvidia")
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(NVMLError=NvmlError))  # type: ignore[arg-type]
    with pytest.raises(AttestationError, match="too old"):
        NvidiaGpu()

    def fail() -> None:
        raise NvmlError("Driver Not Loaded")

    there = Nvml(gpu)
    monkeypatch.setattr(there, "nvmlInit", fail)
    monkeypatch.setitem(sys.modules, "pynvml", there)  # type: ignore[arg-type]
    with pytest.raises(AttestationError, match="Driver Not Loaded"):
        NvidiaGpu()
