"""What this CPU computes fast: torch takes the same ways on all of them, and some ways are slow on some."""

from functools import cache

import torch


@cache
def is_intel() -> bool:
    """Say whether the CPU is Intel's. On x86, torch multiplies with MKL, which has slower kernels for other CPUs."""
    return str(torch.cpu.get_capabilities().get("cpu_name")).startswith("Intel")


@cache
def has_products(dtype: torch.dtype) -> bool:
    """Say whether torch multiplies in that dtype on this CPU without a slow detour; True for all but half dtypes.

    On x86 it has fast products in bfloat16 with AVX-512, and in float16 with AVX512-FP16 (Intel from Sapphire Rapids
    on). On others it has ways of its own, which nobody has compared with `protocol/halves.py`.
    """
    if dtype.itemsize > 2 or torch.cpu.get_capabilities().get("architecture") != "x86_64":
        return True
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    half = torch.ops.mkldnn
    return bool(half._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else half._is_mkldnn_fp16_supported())


@cache
def widened_from(dtype: torch.dtype) -> tuple[int, int] | None:
    """Return from which size on `protocol/halves.py` beats torch's product in that dtype; None where it never does.

    The first number is of rows, the second of both sides of the weight. Without fast products by a weight [3072, 768]
    in bfloat16: 4 rows take 1.4 ms widened and 1.9 by torch, two rows 1.1 and 1.0 (AMD Zen 3, 1 thread, torch 2.13).

    Intel's AVX-512 multiplies bfloat16 no faster than float32, so that many rows are faster in float32, for which MKL
    has the better kernels: by the same weight 512 rows take 9.1 ms widened and 14.7 by torch, 128 rows 2.9 and 3.3, 64
    rows the same; by a weight [128, 768] 512 rows .47 and .60, by [64, 768] .35 and .31 (Intel Xeon without AMX, 2
    threads). AMX is made for bfloat16, and float16 was not compared.
    """
    if not has_products(dtype):
        return 4, 1
    has = torch.cpu.get_capabilities().get
    if dtype == torch.bfloat16 and is_intel() and not has("amx_bf16"):
        return 128, 128
    return None


@cache
def attends_in(dtype: torch.dtype) -> bool:
    """Say whether torch's attention of one row is faster in that half dtype than in float32, conversions included.

    A row of 4 x 12 heads over 140 tokens in bfloat16, one thread, torch 2.13: .20 ms and in float32 .40 on an Intel
    Xeon, 1.4 and .2 on an AMD EPYC. In float16, on the Xeon, .36 and .47.
    """
    names = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}[dtype]
    return is_intel() and any(torch.cpu.get_capabilities().get(name) for name in names)
