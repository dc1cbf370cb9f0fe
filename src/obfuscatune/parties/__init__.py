"""What the three parties of a job share: canonical text, identities, the job and its owners' terms.

The model provider and the data owner each hold an `identity`; `canonical` is the one encoding that is hashed and
signed; `job` is the contract that both sign, `terms` is what each of them allows. `Party` is one of them in its folder,
`Enclave` what it talks to, `Job` the contract.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from obfuscatune.parties.enclave import Enclave
    from obfuscatune.parties.job import Job, SignedJob
    from obfuscatune.parties.party import Party
    from obfuscatune.parties.summary import review

_HOMES = {"Enclave": "enclave", "Job": "job", "SignedJob": "job", "Party": "party", "review": "summary"}

__all__ = ["Enclave", "Job", "Party", "SignedJob", "review"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"obfuscatune.parties.{_HOMES[name]}"), name)
