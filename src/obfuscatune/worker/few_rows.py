"""Products of few rows of residues, as in decoding: the time is that of reading the weight, which the kernel does once.

With four rows oneDNN's int8 product reads 13 GB/s on a core of an AMD EPYC machine, and the kernel 20 to 27 GB/s, which
is what the core gets from its memory.
"""

import ctypes

import torch
from torch import Tensor

from obfuscatune.protocol.native import kernel
from obfuscatune.protocol.pool import on_threads

FEW = 16  # rows; beyond them oneDNN's product is as fast
_BYTES_OF_A_THREAD = 4 * 1024**2  # of weight; for less a second thread costs more than it helps


def few_rows(x: Tensor, w: Tensor, primes: list[int], out: Tensor) -> bool:
    """Put ``x w mod p`` into ``out``. Returns False, with nothing done, where kernel or CPU cannot, or rows are many.

    Args:
        x: int8 ``[L, rows, in]``, one plane of centred residues for each of the L primes.
        w: int8 ``[L, in, out]``.
        out: int8 ``[L, rows, out]``.
    """
    native, (planes, rows, terms), columns = kernel(), x.shape, w.shape[2]
    ours = all(tensor.is_cpu and tensor.is_contiguous() for tensor in (x, w, out))
    if native is None or not ours or not 1 <= rows <= FEW:
        return False
    moduli = (ctypes.c_int32 * planes)(*primes)
    threads = max(1, min(torch.get_num_threads(), planes, w.numel() // _BYTES_OF_A_THREAD))
    bounds = [planes * i // threads for i in range(threads + 1)]

    def some(i: int) -> int:
        return int(
            native.few_rows(
                ctypes.c_void_p(x.data_ptr()),
                ctypes.c_int64(rows),
                ctypes.c_int64(terms),
                ctypes.c_void_p(w.data_ptr()),
                ctypes.c_int64(columns),
                moduli,
                ctypes.c_int64(bounds[i]),
                ctypes.c_int64(bounds[i + 1]),
                ctypes.c_void_p(out.data_ptr()),
            )
        )

    done = on_threads(some, threads)
    if min(done) < 0:
        raise MemoryError("of the kernel of few rows")
    return max(done) == 0
