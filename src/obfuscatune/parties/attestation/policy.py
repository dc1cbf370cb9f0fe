"""A verifier's policy: which platforms, in which state, running which code. A TOML file: see docs/attestation.md.

What is not allowed by name is refused: no simulation, no debugging, no outdated platform, no code that is not listed. A
policy that pins no code is itself refused, because any program at all runs in a genuine enclave.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from obfuscatune.errors import FormatError, UsageError
from obfuscatune.parties.attestation.certificates import MAX_CHAIN_BYTES, read_chain
from obfuscatune.parties.attestation.evidence import KINDS, Kind
from obfuscatune.parties.attestation.gpu_reference import MAX_REFERENCE_BYTES, GpuReference, read_reference
from obfuscatune.parties.attestation.tables import Table
from obfuscatune.parties.files import read_small

# Names of measurements and their lengths in bytes. isv_prod_id and isv_svn are numbers.
_SNP = {
    **{"measurement": 48, "host_data": 32, "id_key_digest": 48, "author_key_digest": 48},
    **{"family_id": 16, "image_id": 16},
}
_TDX = {
    **{"mrtd": 48, "rtmr0": 48, "rtmr1": 48, "rtmr2": 48, "rtmr3": 48},
    **{"mrseam": 48, "mrconfigid": 48, "mrowner": 48, "mrownerconfig": 48, "mrservicetd": 48},
}
_PCRS = {f"pcr{number}": 32 for number in range(24)}
MEASUREMENTS: Mapping[Kind, Mapping[str, int]] = {
    "sgx": {"mrenclave": 32, "mrsigner": 32},
    "tdx": _TDX,
    "snp": _SNP,
    "tpm": _PCRS,
    "nitro": {f"nitro_pcr{number}": 48 for number in range(32)},
    "azure": {**_SNP, **_TDX, **_PCRS},
}
# What of a machine with a TPM says which programs were started: boot loaders or a unified kernel (4), the files that
# GRUB read (9), the parts of a unified kernel (11). Firmware, settings, secure boot, partitions, commands and
# certificates (0 to 3, 5 to 8, 12 to 15) leave the program open. Software may reset 16 and 23, and 10 (IMA), which
# changes with every program, is in no quote of ours.
# https://uapi-group.org/specifications/specs/linux_tpm_pcr_registry/
_STARTED = ("pcr4", "pcr9", "pcr11")
# Of each kind one of these sets must be named: what pins the code. A signer alone would accept all that it ever signed.
PINS: Mapping[Kind, tuple[frozenset[str], ...]] = {
    "sgx": (frozenset({"mrenclave"}), frozenset({"mrsigner", "isv_prod_id", "isv_svn"})),
    "tdx": (frozenset({"mrtd"}),),
    "snp": (frozenset({"measurement"}),),
    "tpm": tuple(frozenset({name}) for name in _STARTED),
    "nitro": (frozenset({"nitro_pcr0"}),),  # the whole image
    # The paravisor, or who signed it, and what the guest has booted.
    "azure": tuple(
        frozenset({started, name}) for started in _STARTED for name in ("measurement", "id_key_digest", "mrtd")
    ),
}
# Intel's, without Revoked, which nobody can allow.
TCB_STATUSES = (
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
)
TCB_PARTS = ("bootloader", "tee", "snp", "microcode")
TURIN_PART = "fmc"  # of Turin alone, beside those
MAX_COLLATERAL_BYTES = 256 * 1024
_MAX_FILE_BYTES = 64 * 1024
_MAX_AGE_SECONDS = 86_400
_ADVISORY = re.compile(r"INTEL-SA-[0-9]{5}")
_PROVIDER = re.compile(r"[ -~]{1,64}")


@dataclass(frozen=True)
class Policy:
    """What a verifier accepts. The defaults are the strictest, and accept nothing until measurements are named.

    Attributes:
        kinds: formats of evidence. allow_debug: of SEV-SNP guests; a TD or enclave for debugging is never accepted.
        tcb_status: of Intel platforms. advisories: security advisories that may apply to one.
        max_age_seconds: of claims. collateral: JSON text of dcap-qvl, used instead of the evidence's.
        allow_dynamic_platform, allow_cached_keys, allow_smt: properties of a platform that Intel lets a verifier judge;
            the last one for SEV-SNP too.
        certificates: of SEV-SNP platforms, PEM: VCEKs, ASK and ARK for evidence without them. amd_crl: AMD's
            revocation list, DER or PEM.
        vlek_providers: of SEV-SNP, whose VLEKs may sign; a VLEK is a provider's for all its chips.
        min_tcb: of SEV-SNP platforms, by ``TCB_PARTS``; those of Turin have ``fmc`` too, and are refused without it.
        max_vmpl: privilege level that a report may come from.
        measurements: name to allowed values, lower-case hex. isv_prod_id: allowed numbers. isv_svn: least number.
        any_measurement: judge no measurement of simulated evidence.
        allow_simulation: accept evidence under ``simulation_roots`` (DER) or ``simulation_tpm_keys``, marked as such.
        tpm_keys: SHA-256 of the DER SubjectPublicKeyInfo of attestation keys of TPMs, hex.
        gpu: what the machine's GPU must be; None: evidence need not speak of one.
    """

    kinds: tuple[Kind, ...]
    allow_debug: bool = False
    tcb_status: tuple[str, ...] = ("UpToDate",)
    advisories: tuple[str, ...] = ()
    max_age_seconds: int = 600
    collateral: str | None = None
    allow_dynamic_platform: bool = False
    allow_cached_keys: bool = False
    allow_smt: bool = False
    certificates: bytes | None = None
    amd_crl: bytes | None = None
    vlek_providers: tuple[str, ...] = ()
    min_tcb: Mapping[str, int] | None = None
    max_vmpl: int = 0
    measurements: Mapping[str, frozenset[str]] = field(default_factory=dict)
    isv_prod_id: frozenset[int] | None = None
    isv_svn: int | None = None
    any_measurement: bool = False
    allow_simulation: bool = False
    simulation_roots: tuple[bytes, ...] = ()
    simulation_tpm_keys: frozenset[str] = frozenset()
    tpm_keys: frozenset[str] = frozenset()
    gpu: GpuReference | None = None

    def pins(self, kind: Kind) -> bool:
        """Return whether the named measurements pin the code of evidence of this kind."""
        named = set(self.measurements)
        named |= {name for name in ("isv_prod_id", "isv_svn") if getattr(self, name) is not None}
        return any(pin <= named for pin in PINS[kind])

    @classmethod
    def load(cls, path: Path) -> "Policy":
        """Read a policy file; files that it names are relative to it.

        Raises:
            UsageError: unreadable, or anything in it unknown, of a wrong type or missing: all faults at once.
        """
        problem = ""
        fields: dict[str, Any] = {}
        try:
            fields = tomllib.loads(read_small(path, _MAX_FILE_BYTES, "policy").decode("utf-8-sig"))
        except tomllib.TOMLDecodeError as error:
            problem = str(error)
        except (UnicodeDecodeError, RecursionError):
            problem = "not UTF-8, or nested too deep"
        if problem:
            raise UsageError("policy is not TOML", got=problem, where=str(path))
        faults: list[str] = []
        policy = cls(**_read(Table(fields, "", faults), path.parent))
        faults = faults or _wanting(policy)  # what is read from a broken file would only add faults that are none
        if faults:
            hint = "docs/attestation.md has all keys"
            raise UsageError(f"policy is refused: {'; '.join(faults)}", where=str(path), hint=hint)
        return policy


def _read(file: Table, folder: Path) -> dict[str, Any]:
    """Return the attributes of a policy."""
    names_gpu = "gpu" in file
    platform, measured, simulation, tpm, gpu = (
        file.table(name) for name in ("platform", "measurements", "simulation", "tpm", "gpu")
    )
    found: dict[str, Any] = {
        "kinds": platform.words("kinds", KINDS, ()),
        "tcb_status": platform.words("tcb_status", TCB_STATUSES, ("UpToDate",)),
        "advisories": platform.words("advisories", _ADVISORY, ()),
        "vlek_providers": platform.words("vlek_providers", _PROVIDER, ()),
        "max_age_seconds": platform.number("max_age_seconds", range(1, _MAX_AGE_SECONDS + 1), 600),
        "max_vmpl": platform.number("max_vmpl", range(4), 0),
        "collateral": platform.file("collateral", folder, MAX_COLLATERAL_BYTES),
        "certificates": platform.data("certificates", folder, MAX_CHAIN_BYTES),
        "amd_crl": platform.data("amd_crl", folder, MAX_CHAIN_BYTES),
        "any_measurement": measured.flag("any_measurement"),
        "allow_simulation": simulation.flag("allow"),
        "simulation_roots": _certificates(simulation, folder),
        "simulation_tpm_keys": simulation.hexes("tpm_keys", 32),
        "tpm_keys": tpm.hexes("keys", 32),
        "gpu": _gpu(gpu, folder) if names_gpu else None,
    }
    for name in ("allow_debug", "allow_dynamic_platform", "allow_cached_keys", "allow_smt"):
        found[name] = platform.flag(name)
    if "min_tcb" in platform:
        parts = platform.table("min_tcb")
        named = (*TCB_PARTS, *([TURIN_PART] if TURIN_PART in parts else []))
        found["min_tcb"] = {part: parts.number(part, range(256)) for part in named}
        parts.end()
    sizes = {name: size for names in MEASUREMENTS.values() for name, size in names.items()}
    found["measurements"] = {name: measured.hexes(name, size) for name, size in sizes.items() if name in measured}
    if "isv_prod_id" in measured:
        found["isv_prod_id"] = measured.numbers("isv_prod_id", range(1 << 16))
    if "isv_svn" in measured:
        found["isv_svn"] = measured.number("isv_svn", range(1 << 16))
    for table in (platform, measured, simulation, tpm, gpu, file):
        table.end()
    return found


def _gpu(gpu: Table, folder: Path) -> GpuReference | None:
    text = gpu.file("reference", folder, MAX_REFERENCE_BYTES)
    try:
        return read_reference("" if text is None else text)
    except FormatError as error:
        gpu.faults.append(f"gpu.reference: {error.what}")
    return None


def _certificates(simulation: Table, folder: Path) -> tuple[bytes, ...]:
    text = simulation.file("root", folder, _MAX_FILE_BYTES)
    if text is None:
        return ()
    try:
        return tuple(certificate.der for certificate in read_chain(text.encode(), "simulation.root"))
    except FormatError as error:
        simulation.faults.append(error.what)
    return ()


def _idle(policy: Policy) -> list[str]:
    """Return what the policy demands and no evidence of its kinds is asked for: whoever wrote it relies on it."""
    kinds = set(policy.kinds)
    judged = {name for kind in kinds for name in MEASUREMENTS[kind]}
    idle = [f"measurements.{name}" for name in policy.measurements if name not in judged]
    of_sgx = [name for name in ("isv_prod_id", "isv_svn") if getattr(policy, name) is not None]
    idle += [f"measurements.{name}" for name in of_sgx if "sgx" not in kinds]
    of_amd = [name for name in ("min_tcb", "amd_crl") if getattr(policy, name) is not None]
    idle += [f"platform.{name}" for name in of_amd if not kinds & {"snp", "azure"}]
    idle += ["tpm.keys"] if policy.tpm_keys and "tpm" not in kinds else []
    return idle if kinds else []  # without any, that is what is wrong


def _wanting(policy: Policy) -> list[str]:
    """Return what is missing in the policy as a whole."""
    faults = []
    if not policy.kinds:
        faults.append(f"platform.kinds is missing: expected some of {', '.join(KINDS)}")
    faults += [f"measurements.{name} allows no value" for name, values in policy.measurements.items() if not values]
    faults += [f"{name} is judged of none of platform.kinds" for name in _idle(policy)]
    if policy.any_measurement and not policy.allow_simulation:
        faults.append("measurements.any_measurement is for simulation.allow = true only")
    for kind in policy.kinds:
        if not policy.pins(kind) and not policy.any_measurement:
            pins = " or ".join(" with ".join(sorted(pin)) for pin in PINS[kind])
            faults.append(f"no measurement pins the code of {kind}: expected measurements.{pins}")
    # Of Azure's machines those whose policy names an MRTD are TDs.
    amd = "snp" in policy.kinds or ("azure" in policy.kinds and "mrtd" not in policy.measurements)
    if amd and policy.min_tcb is None:
        faults.append("platform.min_tcb is missing: nothing else says which snp platforms are outdated")
    if "tpm" in policy.kinds and not policy.tpm_keys and not policy.simulation_tpm_keys:
        faults.append("tpm.keys is missing: no root says which TPMs are genuine")
    trusted = policy.simulation_roots or policy.simulation_tpm_keys
    if policy.allow_simulation and not trusted:
        faults.append("simulation.allow without simulation.root or simulation.tpm_keys")
    if trusted and not policy.allow_simulation:
        faults.append("simulation.root or simulation.tpm_keys without simulation.allow = true")
    return faults
