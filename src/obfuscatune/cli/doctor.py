"""``obfuscatune doctor``: what this machine has for enclave and worker, and what it has not."""

import json
import os
import platform
import resource
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from obfuscatune.cli.options import option, takes
from obfuscatune.protocol.waiting import WAITING

EPILOG = "Examples:\n\nobfuscatune doctor\n\nobfuscatune doctor --json"

TEE_PATHS = {
    "/dev/sgx_enclave": "SGX: this machine can start enclaves",
    "/dev/attestation": "Gramine: this process runs inside an SGX enclave",
    "/dev/tdx_guest": "TDX: this machine is a confidential VM",
    "/dev/sev-guest": "SEV-SNP: this machine is a confidential VM",
    "/sys/kernel/config/tsm/report": "kernel interface for attestation reports",
    "/dev/tpm*": "TPM",
}
# A TPM measures the boot, and SGX devices let others start enclaves: neither keeps the owner out of this process.
_INSIDE_A_TEE = ("/dev/attestation", "/dev/tdx_guest", "/dev/sev-guest")
NO_TEE = "no TEE found: this process protects nothing from the machine's owner; for development only"
TEE = "a TEE was found; that it is genuine, and runs this program, only attestation can tell, which is not checked here"

_FAST, _SLOW = "fast", "slow: load models in float32, or protected, so that most products are computed in float32"
_SLOW_INT8 = "slow: a worker of `shared` multiplies 16-bit integers or float32 instead, at 2 to 3 times the cost"


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Options of ``obfuscatune doctor``."""

    as_json: bool = option("print JSON for scripts", False, flag="--json")


@takes(DoctorOptions)
def command(options: DoctorOptions) -> None:
    """Look at this machine: versions, threads, devices, TEE devices, limits of the process."""
    found = examine()
    if options.as_json:
        print(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        if name == "tee_devices":
            for path, there in value.items():
                print(f"{path:<32}{'found' if there else 'not found':<12}{TEE_PATHS[path]}")
        elif name != "verdict":
            print(f"{name:<32}{', '.join(map(str, value)) or 'none' if isinstance(value, list) else value}")
    print(f"\n{found['verdict']}")


def examine(root: Path = Path("/")) -> dict[str, Any]:
    """Return the findings as plain values. ``root``: where device files are looked for."""
    import torch

    from obfuscatune.protocol.cpu import has_products
    from obfuscatune.protocol.native import BUILD_HINT, kernel
    from obfuscatune.worker.residues import uses_int8_products

    devices = {path: any(root.glob(path[1:])) for path in TEE_PATHS}
    inside = any(devices[path] for path in _INSIDE_A_TEE)
    core = resource.getrlimit(resource.RLIMIT_CORE)[0]
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
        "cpu_threads": torch.get_num_threads(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        **{name: os.environ.get(name, "not set: enclave and worker spin for each other's cores") for name in WAITING},
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "bfloat16_products": _FAST if has_products(torch.bfloat16) else _SLOW,
        "float16_products": _FAST if has_products(torch.float16) else _SLOW,
        "int8_products": _FAST if uses_int8_products(torch.device("cpu")) else _SLOW_INT8,
        "kernel_of_shares": "built" if kernel() is not None else f"not built; {BUILD_HINT}",
        "core_dumps": "off" if core == 0 else "on: a crash may write keys and prompts to the disk (ulimit -c 0)",
        "tee_devices": devices,
        "verdict": TEE if inside else NO_TEE,
    }
