"""A seed to uniform residues, on both sides alike: ChaCha20 bytes, rejected where not below the prime.

The first shares of a matrix are uniform numbers, so that 32 bytes can stand for them: the enclave makes them of a seed
that it uses once, and the worker of the same seed. ``byte % p`` would be biased. For a prime below 128, seven bits of
each byte are taken.

Plane l of a seed has the keystream of ChaCha20 with the seed as its key and the nonce l (96 bits, little-endian), its
blocks from 0 on taken sixteen at a time, word by word: word 0 of each of the sixteen, then word 1, and so on. Sources:
RFC 8439, section 2.3; rejection: von Neumann.
"""

import ctypes
import math
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from obfuscatune.errors import ProtocolError
from obfuscatune.protocol.native import kernel
from obfuscatune.protocol.residues import MOST_TERMS, PRIMES

SEED_BYTES = 32
_LANES = 16  # blocks at a time, 64 bytes each
_CONSTANTS = np.frombuffer(b"expand 32-byte k", dtype="<u4")


def drawn(seed: bytes, primes: Sequence[int], shape: Sequence[int]) -> dict[str, Any]:
    """Return what stands in a request's field ``drawn`` for a tensor that the other side makes of a seed."""
    return {"seed": seed.hex(), "primes": list(primes), "shape": list(shape)}


def tensors_drawn(field: Any, most: int) -> dict[str, Tensor]:
    """Return the tensors of a request's field ``drawn``, by name.

    Args:
        field: as it came. most: bytes of all of them together, checked before any is made.

    Raises:
        ProtocolError: not such a field, or more than that.
    """
    if not isinstance(field, Mapping) or not 0 < len(field) <= _MOST_DRAWN:
        raise ProtocolError("tensors to draw", got=type(field).__name__, expected=f"a map of 1 to {_MOST_DRAWN}")
    checked = {name: _checked(entry) for name, entry in field.items()}
    size = sum(len(primes) * math.prod(shape) for _, primes, shape in checked.values())
    if size > most:
        raise ProtocolError("tensors to draw", got=f"{size} bytes", expected=f"at most {most}")
    return {name: expand(*entry) for name, entry in checked.items()}


def _checked(entry: Any) -> tuple[bytes, list[int], list[int]]:
    if not isinstance(entry, Mapping) or set(entry) != {"seed", "primes", "shape"}:
        raise ProtocolError("a tensor to draw", expected="seed, primes, shape")
    seed, primes, shape = entry["seed"], entry["primes"], entry["shape"]
    if not isinstance(seed, str) or len(seed) != 2 * SEED_BYTES or not set(seed) <= set(string.hexdigits):
        raise ProtocolError("seed of a tensor", expected=f"{2 * SEED_BYTES} hexadecimal digits")  # never quoted
    listed = isinstance(primes, list) and 1 <= len(primes) <= len(PRIMES)
    if not listed or not all(type(p) is int and p in PRIMES for p in primes):
        raise ProtocolError("primes of a tensor", expected=f"some of {PRIMES}")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and 0 < n <= _LONGEST for n in shape):
        raise ProtocolError("shape of a tensor to draw", expected="rows and columns")
    return bytes.fromhex(seed), primes, shape


_MOST_DRAWN = 8
_LONGEST = max(MOST_TERMS, 1 << 24)


def expand(seed: bytes, primes: Sequence[int], shape: Sequence[int], planes: range | None = None) -> Tensor:
    """Return the centred residues of a seed, int8 ``[L, *shape]``.

    Args:
        planes: those that are wanted, all where None; the others are left as they come.

    Raises:
        ValueError: a seed of another length.
    """
    if len(seed) != SEED_BYTES:
        raise ValueError(f"a seed of {len(seed)} bytes")
    out = torch.empty(len(primes), math.prod(shape), dtype=torch.int8)
    native = kernel()
    for i in range(len(primes)) if planes is None else planes:
        if native is None:
            _fill(seed, i, primes[i], out[i])
        else:
            pointer, wanted = ctypes.c_void_p(out[i].data_ptr()), ctypes.c_int64(out.shape[1])
            native.expand(seed, ctypes.c_uint32(i), ctypes.c_int32(primes[i]), pointer, wanted)
    return out.view(len(primes), *shape)


def _fill(seed: bytes, nonce: int, p: int, out: Tensor) -> None:
    filled = counter = 0
    while filled < len(out):
        batches = (len(out) - filled) // (64 * _LANES) + 1
        source = keystream(seed, nonce, counter, batches)
        filled += keep_below(source, p, out[filled:])
        counter += batches * _LANES


def keep_below(source: np.ndarray, p: int, out: Tensor) -> int:
    """Put those bytes, masked to p's bits, that are below p into out, centred, while there is room; return how many."""
    found = torch.from_numpy(source) & (127 if p < 128 else 255)
    found = found[found < p][: len(out)].to(torch.int16)
    out[: len(found)] = torch.where(found > p // 2, found - p, found).to(torch.int8)
    return len(found)


def keystream(seed: bytes, nonce: int, counter: int, batches: int) -> np.ndarray:
    """Return ``1024 batches`` bytes of a keystream from block ``counter`` on, in the order above."""
    state = np.zeros((16, batches * _LANES), dtype=np.uint32)
    state[:4] = _CONSTANTS[:, None]
    state[4:12] = np.frombuffer(seed, dtype="<u4")[:, None]
    state[12] = counter + np.arange(batches * _LANES, dtype=np.uint32)
    state[13] = nonce
    x = state.copy()
    for _ in range(10):
        for column in range(4):
            _quarter(x, *(4 * row + column for row in range(4)))
        for column in range(4):
            _quarter(x, *(4 * row + (column + row) % 4 for row in range(4)))
    words = (x + state).reshape(16, batches, _LANES).swapaxes(0, 1)
    return np.frombuffer(words.astype("<u4").tobytes(), dtype=np.uint8).copy()


def _quarter(x: np.ndarray, a: int, b: int, c: int, d: int) -> None:
    for i, j, k, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        x[i] += x[j]
        x[k] ^= x[i]
        x[k] = x[k] << np.uint32(bits) | x[k] >> np.uint32(32 - bits)
