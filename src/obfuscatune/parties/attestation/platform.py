"""The platform an enclave runs on: its source of quotes, its sealing key, its counter.

| specification | quotes | sealing key | counter |
|---|---|---|---|
| ``configfs`` | TDX or SEV-SNP guest, by configfs-tsm | SNP: from the processor; TDX: none | none |
| ``gramine`` | SGX, by Gramine | from MRENCLAVE and the processor | none |
| ``azure`` | SEV-SNP or TDX guest of Azure, by its paravisor's report and vTPM | as ``tpm`` | in the TPM |
| ``nitro`` | AWS Nitro enclave, by its security module | none | none |
| ``tpm`` | vTPM | from its seed and the PCRs | in the TPM |
| ``simulation:DIR`` | TDX, simulated: protects nothing | from DIR | in DIR |
| ``simulation-snp:DIR`` | SEV-SNP, simulated: protects nothing | from DIR | in DIR |
"""

from pathlib import Path
from typing import Literal, Protocol

from obfuscatune.errors import UsageError
from obfuscatune.parties.attestation.evidence import Attester

SPECIFICATIONS = ("configfs", "gramine", "tpm", "azure", "nitro", "simulation:DIR", "simulation-snp:DIR")


class Counter(Protocol):
    """A monotonic counter that survives restarts and is not put back with the disk."""

    def read(self) -> int:
        """Return the count; raises AttestationError where it cannot be read."""
        ...

    def used(self) -> bool:
        """Return whether it was ever moved or read here before; raises AttestationError where it cannot be read."""
        ...

    def increment(self) -> int:
        """Add one and return the new count; raises AttestationError where it cannot be written."""
        ...


class Platform(Protocol):
    """What an enclave has from the machine it runs on."""

    @property
    def attester(self) -> Attester:
        """Source of quotes."""
        ...

    @property
    def simulated(self) -> bool:
        """Whether nothing is protected here."""
        ...

    @property
    def name(self) -> str:
        """For people."""
        ...

    @property
    def counter(self) -> Counter | None:
        """Monotonic counter; None where the hardware has none."""
        ...

    def sealing_key(self) -> bytes | None:
        """Return 32 secret bytes, the same after a restart of the same code here; None where the hardware has none.

        Raises:
            AttestationError: the hardware has a key and does not give it now.
        """
        ...

    def measurements(self) -> dict[str, str]:
        """Return what the hardware says now of the running code, by the names of a policy, in hexadecimal.

        For the operator to show. A party compares it with what it computed itself, and does not take it from here.

        Raises:
            AttestationError: there is no quote to have.
        """
        ...


def open_platform(specification: str) -> Platform:
    """Return the platform of one of `SPECIFICATIONS`; a simulated one is made where its directory has none.

    Nothing is detected: who starts an enclave says what it runs on, so no fault of the hardware makes a simulation.

    Raises:
        UsageError: another specification, or simulated hardware of the other kind or damaged.
        AttestationError: this machine is no such platform.
    """
    kind, colon, rest = specification.partition(":")
    if kind in ("simulation", "simulation-snp") and rest:
        return _simulated("tdx" if kind == "simulation" else "snp", Path(rest))
    if colon or kind not in ("configfs", "gramine", "tpm", "azure", "nitro"):
        raise UsageError("platform", got=repr(specification), expected=" or ".join(SPECIFICATIONS))
    if kind == "configfs":
        from obfuscatune.parties.attestation.configfs import ConfigfsPlatform

        return ConfigfsPlatform()
    if kind == "gramine":
        from obfuscatune.parties.attestation.gramine import GraminePlatform

        return GraminePlatform()
    if kind == "azure":
        from obfuscatune.parties.attestation.azure_vm import AzurePlatform

        return AzurePlatform()
    if kind == "nitro":
        from obfuscatune.parties.attestation.nitro_enclave import NitroPlatform

        return NitroPlatform()
    from obfuscatune.parties.attestation.vtpm import VtpmPlatform

    return VtpmPlatform()


def _simulated(kind: Literal["tdx", "snp"], directory: Path) -> Platform:
    from obfuscatune.parties.attestation.simulator import SimulatedPlatform

    exists = SimulatedPlatform.exists(directory)
    platform = SimulatedPlatform(directory) if exists else SimulatedPlatform.create(directory, kind)
    if platform.kind != kind:
        raise UsageError("simulated hardware of another kind", got=platform.kind, expected=kind, where=str(directory))
    return platform
