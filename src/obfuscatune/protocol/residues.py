"""Centred residues: integers modulo a prime p, as int8 from -(p - 1) / 2 to (p - 1) / 2.

Shares are residues modulo the largest primes below 256, so that a residue is a byte. Six carry 47 bits, which of primes
below 128 would take seven. A last, small one brings 54, the most that a float64 holds. Int8 products of CPUs without
VNNI may saturate on such numbers, or be slow; a worker finds that out, and uses a kernel of its own, or float32
products, of which one of up to `EXACT_TERMS` terms is exact.
"""

import ctypes

from torch import Tensor

from obfuscatune.protocol.native import kernel

PRIMES = (251, 241, 239, 233, 229, 227, 83)
LARGEST = 125
EXACT_TERMS = 2**24 // LARGEST**2  # 1073: sums of so many products of residues are below 2^24
MOST_TERMS = 2**31 // LARGEST**2  # and of so many, below 2^31


def centred(x: Tensor, p: int) -> Tensor:
    """Return the centred residues of integers of any integer dtype, in that dtype: the definition."""
    return (x + p // 2).remainder(p) - p // 2


def reduce(x: Tensor, p: int, out: Tensor) -> Tensor:
    """Put the centred residues of int32 numbers into ``out``, int8 and contiguous; by the kernel if it is there."""
    native = kernel()
    if native is None or not x.is_cpu:
        return out.copy_(centred(x.long(), p))
    x = x.contiguous()
    native.reduce(ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.numel()), p, ctypes.c_void_p(out.data_ptr()))
    return out
