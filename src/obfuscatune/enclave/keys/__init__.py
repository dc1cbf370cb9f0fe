"""Keys: secret invertible linear maps R of the feature axis, x* = x R for rows x, and their randomness.

| family | R | multiply-adds per row | hides |
|---|---|---|---|
| `identity` | I | 0 | nothing, the baseline |
| `permutation` | a permutation | 0 | the order only |
| `monarch` | P0 B1 P1 B2 P2 | 2 n block | coordinates, not the Gram matrix of rows |
| `haar` | uniform orthogonal | n^2 | the same |
| `conditioned` | QA S QB, cond R = kappa | n^2 | the same, blurred by kappa |
| `gaussian` | N(0, 1/n), ill-conditioned | n^2 | the same; loses digits, the ablation |

Only the enclave imports this package. All randomness is a `Stream` of the `MasterSecret`.
"""

from collections.abc import Callable
from types import MappingProxyType

from obfuscatune.enclave.keys.base import (
    IdentityKey,
    Key,
    OrthogonalKey,
    check_orthogonal,
    decode,
    decode_parts,
    encode,
)
from obfuscatune.enclave.keys.conditioned import DenseKey, conditioned, gaussian
from obfuscatune.enclave.keys.monarch import MonarchKey, monarch
from obfuscatune.enclave.keys.orthogonal import HaarKey, haar
from obfuscatune.enclave.keys.per_head import ConcatKey, HeadKeys, PerHeadKey, head_keys
from obfuscatune.enclave.keys.permutation import PermutationKey, permutation
from obfuscatune.enclave.keys.source import MasterSecret, Stream
from obfuscatune.errors import UsageError

__all__ = [
    "FAMILIES",
    "ConcatKey",
    "DenseKey",
    "HaarKey",
    "HeadKeys",
    "IdentityKey",
    "Key",
    "MasterSecret",
    "MonarchKey",
    "OrthogonalKey",
    "PerHeadKey",
    "PermutationKey",
    "Stream",
    "build",
    "check_orthogonal",
    "conditioned",
    "decode",
    "decode_parts",
    "encode",
    "gaussian",
    "haar",
    "head_keys",
    "monarch",
    "permutation",
]

Builder = Callable[[Stream, int, int, float], Key]

FAMILIES: MappingProxyType[str, Builder] = MappingProxyType(
    {
        "identity": lambda stream, size, block, kappa: IdentityKey(size),
        "haar": lambda stream, size, block, kappa: haar(stream, size),
        "monarch": lambda stream, size, block, kappa: monarch(stream, size, block),
        "gaussian": lambda stream, size, block, kappa: gaussian(stream, size),
        "conditioned": lambda stream, size, block, kappa: conditioned(stream, size, kappa),
        "permutation": lambda stream, size, block, kappa: permutation(stream, size),
    }
)


def build(family: str, stream: Stream, size: int, *, block: int = 64, kappa: float = 1.0) -> Key:
    """The key of a named family; ``block`` is for `monarch`, ``kappa`` for `conditioned`. Raises: `UsageError`."""
    if family not in FAMILIES:
        raise UsageError("unknown key family", got=family, expected=f"one of {', '.join(FAMILIES)}")
    if size < 1:
        raise UsageError("a key has an impossible size", got=size, expected="at least 1")
    return FAMILIES[family](stream, size, block, kappa)
