"""Products of residues on CPUs with AVX2 and without int8 instructions (AMD before Zen 4, Intel before Cascade Lake).

There torch's int8 product takes 40 times as long as a float32 product (torch 2.13, AMD Zen 3). The kernel takes 0.7
times as long for many rows, and 0.3 times for four; `float_product`, which converts every weight, takes 1.2 times.
"""

import ctypes

from torch import Tensor

from obfuscatune.protocol.native import kernel


def pairs_product(x: Tensor, w: Tensor, prime: int, out: Tensor) -> bool:
    """Put ``x w mod p`` into ``out``. Returns False, with nothing done, where there is no kernel or no AVX2.

    Args:
        x: int8 ``[rows, in]``, contiguous; centred residues modulo the prime p.
        w: int8 ``[in, out]`` of any strides; at most `MOST_TERMS` rows.
        out: int8 ``[rows, out]``, contiguous.
    """
    native, (rows, terms), columns = kernel(), x.shape, w.shape[1]
    if native is None or not (x.is_cpu and w.is_cpu and x.is_contiguous() and out.is_contiguous()):
        return False
    done = native.pairs_product(
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_int64(rows),
        ctypes.c_int64(terms),
        ctypes.c_void_p(w.data_ptr()),
        *(ctypes.c_int64(stride) for stride in w.stride()),
        ctypes.c_int64(columns),
        prime,
        ctypes.c_void_p(out.data_ptr()),
    )
    if done < 0:
        raise MemoryError("of the kernel of pairs")
    return bool(done == 0)
