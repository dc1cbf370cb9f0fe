"""The GPU of this machine as a source of reports, and the platform that shows one beside its own quote.

NVML gives report and certificates where a GPU with confidential computing switched on is the machine's. It is asked
through `pynvml` (the package nvidia-ml-py), which is not installed with this one: without it, without such a GPU, or in
developer mode, which lets the host look into the GPU, there is no report and the enclave does not start.

The model of an enclave's own layers is on the CPU (profile ``enclave`` too). The GPU is for a worker that the enclave
spawns in the same machine.
"""

import importlib
from pathlib import Path
from typing import Any, Protocol

from obfuscatune.errors import AttestationError, UsageError
from obfuscatune.parties.attestation.evidence import Attester, Quote
from obfuscatune.parties.attestation.gpu import CERTIFICATES, REPORT, gpu_nonce
from obfuscatune.parties.attestation.platform import Counter, Platform

SPECIFICATIONS = ("nvidia", "simulation:DIR")
_HINT = "pip install nvidia-ml-py, in a confidential VM with one GPU of NVIDIA in confidential computing mode"


class Gpu(Protocol):
    """A source of reports."""

    simulated: bool

    def report(self, nonce: bytes) -> tuple[bytes, bytes]:
        """Return a report over 32 bytes, and the chain of its key (PEM); raises AttestationError."""
        ...


class NvidiaGpu:
    """The only GPU of this machine, by NVML.

    Raises:
        AttestationError: no `pynvml`, no driver, another number of GPUs than one, or not in confidential mode.
    """

    simulated = False

    def __init__(self) -> None:
        try:
            self._nvml: Any = importlib.import_module("pynvml")
        except ImportError:
            raise AttestationError("no GPU can be asked: pynvml is not installed", hint=_HINT) from None
        self._ask("nvmlInit")
        count = self._ask("nvmlDeviceGetCount")
        if count != 1:
            raise AttestationError("GPUs of this machine", got=count, expected="one, which evidence can speak of")
        state = self._ask("nvmlSystemGetConfComputeState")
        if not state.ccFeature or state.devToolsMode:
            got = "developer mode" if state.ccFeature else "confidential computing is off"
            raise AttestationError("the GPU of this machine is not confidential", got=got, hint=_HINT)
        self._device = self._ask("nvmlDeviceGetHandleByIndex", 0)

    def report(self, nonce: bytes) -> tuple[bytes, bytes]:
        """Return a report over 32 bytes, and the chain of its key (PEM).

        Raises:
            AttestationError: NVML refuses.
        """
        report = self._ask("nvmlDeviceGetConfComputeGpuAttestationReport", self._device, nonce)
        chain = self._ask("nvmlDeviceGetConfComputeGpuCertificate", self._device)
        return (
            bytes(report.attestationReport[: report.attestationReportSize]),
            bytes(chain.attestationCertChain[: chain.attestationCertChainSize]).rstrip(b"\0"),
        )

    def _ask(self, name: str, *arguments: Any) -> Any:
        function = getattr(self._nvml, name, None)
        if function is None:
            raise AttestationError("this pynvml is too old", got=f"no {name}", hint=_HINT)
        try:
            return function(*arguments)
        except self._nvml.NVMLError as error:
            raise AttestationError("NVML gives nothing", got=str(error), where=name, hint=_HINT) from None


class GpuAttester:
    """Quotes of a platform, each with a report of the GPU over the same report data."""

    def __init__(self, attester: Attester, gpu: Gpu) -> None:
        self._attester, self._gpu = attester, gpu

    def quote(self, report_data: bytes) -> Quote:
        """Return the platform's quote with ``gpu_report`` and ``gpu_certificates``; raises AttestationError."""
        quote = self._attester.quote(report_data)
        report, chain = self._gpu.report(gpu_nonce(report_data))
        return Quote(quote.kind, quote.quote, {**quote.extras, REPORT: report, CERTIFICATES: chain})


class GpuPlatform:
    """A platform whose evidence speaks of its GPU too; all else is the platform's."""

    def __init__(self, platform: Platform, gpu: Gpu) -> None:
        self._platform = platform
        self.attester: Attester = GpuAttester(platform.attester, gpu)
        self.simulated: bool = platform.simulated or gpu.simulated
        self.name: str = f"{platform.name} with {'simulated ' if gpu.simulated else ''}GPU"
        self.counter: Counter | None = platform.counter

    def sealing_key(self) -> bytes | None:
        """As the platform. Secret."""
        return self._platform.sealing_key()

    def measurements(self) -> dict[str, str]:
        """As the platform."""
        return self._platform.measurements()


def open_gpu(specification: str) -> Gpu:
    """Return the GPU of one of `SPECIFICATIONS`; a simulated one is made where its directory has none.

    Raises:
        UsageError: another specification. AttestationError: this machine has no such GPU.
    """
    kind, _, rest = specification.partition(":")
    if specification == "nvidia":
        return NvidiaGpu()
    if kind == "simulation" and rest:
        from obfuscatune.parties.attestation.simulated_gpu import SimulatedGpu

        return SimulatedGpu.open(Path(rest))
    raise UsageError("GPU", got=repr(specification), expected=" or ".join(SPECIFICATIONS))
