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

# Names of measurements and their lengths in bytes. isv_prod_id, isv_svn and guest_svn are numbers.
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
# Which programs a machine with a TPM has started. Any software may extend PCR 0 to 15, so whoever boots a system whose
# loader measures nothing can put the digests of a good machine's log into 8, 9 and 11 himself. Only PCR 4 has what the
# firmware starts, extended before that runs. From there on, what PCR 4 names vouches for the rest: GRUB for its
# commands (8) and the files that it reads (9); the stub of a unified kernel for what comes from outside the image, the
# command line, credentials and extensions (12, 13), where zeros say that there was nothing. Of the others, 0 to 3, 5 to
# 7, 14 and 15 (firmware, settings, secure boot, certificates) leave the program open, 11 repeats what PCR 4 says of a
# unified kernel, 16 and 23 may be reset, and 10 (IMA), which changes with every program, is in no quote of ours.
# https://uapi-group.org/specifications/specs/linux_tpm_pcr_registry/
_BOOTED = (("pcr4", "pcr8", "pcr9"), ("pcr4", "pcr12", "pcr13"))
_WHY_BOOTED = (
    "8 and 9 with GRUB, 12 and 13 with a unified kernel image; any other system can set them as it likes once it runs, "
    "but not pcr4, which the firmware extends before"
)
# Of each kind all of one of these groups must be named, and for azure one of each row: what pins the code. A signer
# alone would accept all that it ever signed.
PINS: Mapping[Kind, tuple[tuple[tuple[str, ...], ...], ...]] = {
    "sgx": ((("mrenclave",), ("mrsigner", "isv_prod_id", "isv_svn")),),
    "tdx": ((("mrtd",),),),
    "snp": ((("measurement",),),),
    "tpm": (_BOOTED,),
    "nitro": ((("nitro_pcr0",),),),  # the whole image
    # The paravisor, or who signed it and since which version, and what the guest has booted.
    "azure": ((("measurement",), ("id_key_digest", "guest_svn"), ("mrtd",)), _BOOTED),
}
# Zeros in these say that nothing was measured, or nobody has signed, so that anything at all may run.
_NOT_ZERO = ("pcr4", "pcr8", "pcr9", "id_key_digest")
# Intel's, without Revoked, which nobody can allow.
TCB_STATUSES = (
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
    "TDRelaunchAdvised",
    "TDRelaunchAdvisedConfigurationNeeded",
)
TCB_PARTS = ("bootloader", "tee", "snp", "microcode")
TURIN_PART = "fmc"  # of Turin alone, beside those
MAX_COLLATERAL_BYTES = 256 * 1024
_MAX_FILE_BYTES = 64 * 1024
_MAX_AGE_SECONDS = 86_400
_FLAGS = ("allow_debug", "allow_dynamic_platform", "allow_cached_keys", "allow_smt", "require_alias_check")
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
            the last one for SEV-SNP too. require_alias_check: of SEV-SNP platforms, the firmware's check of the memory.
        certificates: of SEV-SNP platforms, PEM: VCEKs, ASK and ARK for evidence without them. amd_crl: AMD's
            revocation list, DER or PEM.
        vlek_providers: of SEV-SNP, whose VLEKs may sign; a VLEK is a provider's for all its chips.
        min_tcb: of SEV-SNP platforms, by ``TCB_PARTS``; those of Turin have ``fmc`` too, and are refused without it.
        max_vmpl: privilege level that a report may come from.
        measurements: name to allowed values, lower-case hex. isv_prod_id: allowed numbers. isv_svn: least number;
            guest_svn likewise, of SEV-SNP guests.
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
    require_alias_check: bool = False
    certificates: bytes | None = None
    amd_crl: bytes | None = None
    vlek_providers: tuple[str, ...] = ()
    min_tcb: Mapping[str, int] | None = None
    max_vmpl: int = 0
    measurements: Mapping[str, frozenset[str]] = field(default_factory=dict)
    isv_prod_id: frozenset[int] | None = None
    isv_svn: int | None = None
    guest_svn: int | None = None
    any_measurement: bool = False
    allow_simulation: bool = False
    simulation_roots: tuple[bytes, ...] = ()
    simulation_tpm_keys: frozenset[str] = frozenset()
    tpm_keys: frozenset[str] = frozenset()
    gpu: GpuReference | None = None

    def pins(self, kind: Kind) -> bool:
        """Return whether the named measurements pin the code of evidence of this kind."""
        return not _unmet(kind, {*self.measurements, *_numbers(self)})

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
    for name in _FLAGS:
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
    if "guest_svn" in measured:
        found["guest_svn"] = measured.number("guest_svn", range(1 << 32))
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
    amd = bool(kinds & {"snp", "azure"})
    numbers = {"isv_prod_id": "sgx" in kinds, "isv_svn": "sgx" in kinds, "guest_svn": amd}
    idle += [f"measurements.{name}" for name in _numbers(policy) if not numbers[name]]
    of_amd = [name for name in ("min_tcb", "amd_crl") if getattr(policy, name) is not None]
    of_amd += ["require_alias_check"] if policy.require_alias_check else []
    idle += [f"platform.{name}" for name in of_amd if not amd]
    idle += ["tpm.keys"] if policy.tpm_keys and "tpm" not in kinds else []
    return idle if kinds else []  # without any, that is what is wrong


def _numbers(policy: Policy) -> list[str]:
    """Return which of the measurements that are numbers the policy names."""
    return [name for name in ("isv_prod_id", "isv_svn", "guest_svn") if getattr(policy, name) is not None]


def _unmet(kind: Kind, named: set[str]) -> list[tuple[tuple[str, ...], ...]]:
    """Return the rows of ``PINS`` of which no group is named in full."""
    return [row for row in PINS[kind] if not any(named.issuperset(group) for group in row)]


def _unpinned(policy: Policy, kind: Kind) -> list[str]:
    """Return what of the code is not pinned; a measurement that may be zero where this means nothing is not counted."""
    zero = {name for name in _NOT_ZERO if any(not int(value, 16) for value in policy.measurements.get(name, ()))}
    faults = []
    for row in _unmet(kind, {*policy.measurements, *_numbers(policy)} - zero):
        groups = " or ".join(" with ".join(group) for group in row)
        why = f" ({_WHY_BOOTED})" if row is _BOOTED else ""
        counted = [name for name in sorted(zero) if any(name in group for group in row)]
        why += f"; zeros in {', '.join(counted)} pin nothing" if counted else ""
        faults.append(f"no measurement pins the code of {kind}: expected measurements.{groups}{why}")
    return faults


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
        faults += [] if policy.any_measurement else _unpinned(policy, kind)
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
