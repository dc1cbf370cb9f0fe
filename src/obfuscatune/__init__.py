"""Fine-tune and run a proprietary language model on private data, its large layers keyed onto an untrusted accelerator.

    with obfuscatune.protect(model, profile="balanced", worker="spawn") as protected:
        Trainer(model=protected.model, ...).train()

Names are imported when first used: the worker's process imports this package too, and must never load keys.
"""

import importlib
from typing import TYPE_CHECKING, Any

from obfuscatune.protocol.waiting import wait_without_spinning

if TYPE_CHECKING:
    from obfuscatune.enclave.keys.source import MasterSecret
    from obfuscatune.enclave.protect import protect
    from obfuscatune.enclave.protected import Protected
    from obfuscatune.enclave.report import Report
    from obfuscatune.errors import (
        DataError,
        KeyFaultError,
        NotFiniteError,
        ObfuscatuneError,
        ProtocolError,
        UnsupportedModelError,
        UsageError,
        WorkerFault,
    )
    from obfuscatune.profiles import PROFILES, Profile
    from obfuscatune.training.loading import load

__version__ = "0.1.0"

_HOMES = {
    "obfuscatune.enclave.protect": ("protect",),
    "obfuscatune.enclave.protected": ("Protected",),
    "obfuscatune.enclave.report": ("Report",),
    "obfuscatune.errors": (
        "DataError",
        "KeyFaultError",
        "NotFiniteError",
        "ObfuscatuneError",
        "ProtocolError",
        "UnsupportedModelError",
        "UsageError",
        "WorkerFault",
    ),
    "obfuscatune.enclave.keys.source": ("MasterSecret",),
    "obfuscatune.profiles": ("PROFILES", "Profile"),
    "obfuscatune.training.loading": ("load",),
}
wait_without_spinning()  # torch is loaded after this package, or `protect` warns

_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "PROFILES",
    "DataError",
    "KeyFaultError",
    "MasterSecret",
    "NotFiniteError",
    "ObfuscatuneError",
    "Profile",
    "Protected",
    "ProtocolError",
    "Report",
    "UnsupportedModelError",
    "UsageError",
    "WorkerFault",
    "load",
    "protect",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)
