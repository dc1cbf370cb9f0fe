"""Rows to shares, and replies to rows: by the C kernel where it is, else by the torch reference, with equal bits.

A row's result depends on that row alone, so rows are spread over threads.
"""

import ctypes
import functools
import math
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from obfuscatune.enclave.sharing import reference
from obfuscatune.enclave.sharing.scheme import Scheme, centre, lagrange, lift_factor, share_weights
from obfuscatune.protocol.native import BUILD_HINT, kernel
from obfuscatune.protocol.pool import on_threads

Rules = tuple[tuple[tuple[int, ...], ...], ...]  # by prime, and share
_FEW_NUMBERS = 1 << 15  # what one thread does before two have met


@dataclass(frozen=True, slots=True, repr=False)  # a repr would show shares
class Rows:
    """What was made of the rows of one call.

    Attributes:
        shares: for each worker, int8 ``[L, n, width]``, centred. scales: float64 ``[n]``, secret.
        images: int16 ``[n, L, checks]``: what the check's vectors give of the rows, 0 to p - 1.
    """

    shares: list[Tensor]
    scales: Tensor
    images: Tensor


def encode(
    scheme: Scheme,
    x: Tensor,
    column: Tensor,
    drawn: Tensor,
    *,
    most: float | None,
    vectors: Tensor,
    weights: Rules | None = None,
    out: Sequence[Tensor] | None = None,
) -> Rows:
    """Return the shares of rows ``[n, width]`` float32; those of one that is not finite are of zeros.

    Args:
        column: ``[width]`` float64, what the columns are multiplied by first.
        drawn: int8 ``[T, L, n, width]``, the first T workers' shares: uniform, and used once.
        most: the largest norm of a row; None where ``x column`` is rounded as it is.
        vectors: int16 ``[L, checks, width]``, centred.
        weights: for each prime the coefficients of each share that is made; those of the scheme where None.
        out: where each share that is made is put, int8 ``[L, n, width]``, contiguous; new memory where None.
    """
    n, width = x.shape
    rules = share_rules(scheme) if weights is None else weights
    made = len(rules[0])
    half = 0.5 * math.sqrt(width)
    room = 0.0 if most is None else most - half
    native = _kernel_or_warning()
    if native is None:
        shares, scales, images = reference.encode(scheme.primes, x, column, drawn, rules, room, half, vectors)
        if out is not None:
            shares = [place.copy_(share) for place, share in zip(out, shares, strict=True)]
        return Rows([*drawn, *shares], scales, images)
    x, column, drawn, vectors = x.contiguous(), column.contiguous(), drawn.contiguous(), vectors.contiguous()
    coefficients = _int16(rules)
    primes = _primes(scheme)
    out = out or [torch.empty(len(primes), n, width, dtype=torch.int8) for _ in range(made)]
    pointers = _pointers(out)
    scales = torch.empty(n, dtype=torch.float64)
    images = torch.empty(n, len(primes), vectors.shape[1], dtype=torch.int16)
    record = _Encoding(
        x.data_ptr(), column.data_ptr(), n, width, room, half, primes.data_ptr(), len(primes), drawn.data_ptr(),
        len(drawn), coefficients.data_ptr(), made, vectors.data_ptr(), vectors.shape[1],
        ctypes.cast(pointers, ctypes.c_void_p), scales.data_ptr(), images.data_ptr(),
    )  # fmt: skip
    _each(native.encode, record, n, width)
    return Rows([*drawn, *out], scales, images)


def decode(
    scheme: Scheme,
    points: Sequence[int],
    replies: Sequence[Tensor],
    column: Tensor,
    *,
    rows: Rows,
    vectors: Tensor,
) -> Tensor | None:
    """Return the products ``[n, width]`` float32, NaN of rows that were not finite; None where one is not right.

    Args:
        points: as many as are needed.
        replies: of the workers there, int8 ``[L, n, width]``, any numbers. They may lie in memory that a worker can
            change: each byte is read once, and what is checked is what was read.
        column: ``[width]`` float64, what the result is multiplied by.
        rows: what `encode` returned of this call. vectors: int16 ``[L, checks, width]``, centred.
    """
    n, width = replies[0].shape[1:]
    rules = result_rules(scheme, tuple(points))
    native = _kernel_or_warning()
    if native is None:
        replies = [reply.clone() for reply in replies]  # which a worker of this machine may change at any time
        return reference.decode(scheme.primes, replies, rules, vectors, rows.images, rows.scales, column)
    replies = [reply.contiguous() for reply in replies]
    coefficients, primes = _int16(rules), _primes(scheme)
    column, scales, images, vectors = column.contiguous(), rows.scales, rows.images, vectors.contiguous()
    out = torch.empty(n, width, dtype=torch.float32)
    pointers = _pointers(replies)
    record = _Decoding(
        ctypes.cast(pointers, ctypes.c_void_p), len(replies), n, width, primes.data_ptr(), len(primes),
        coefficients.data_ptr(), vectors.data_ptr(), vectors.shape[1], images.data_ptr(), scales.data_ptr(),
        column.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out if _each(native.decode, record, n, width) >= n else None


@functools.cache
def share_rules(scheme: Scheme) -> Rules:
    """For each prime, the coefficients of each share that is made of rows."""
    return tuple(tuple(share_weights(scheme, p)) for p in scheme.primes)


@functools.cache
def weight_rules(scheme: Scheme) -> Rules:
    """The same of a weight, whose residues are multiplied by the inverse of M / p first: then products need not be."""
    rules = share_rules(scheme) if scheme.shares_weights else (((1, *[0] * scheme.threshold),),) * len(scheme.primes)
    return tuple(
        tuple((centre(own * lift_factor(scheme, p), p), *drawn) for own, *drawn in of_prime)
        for p, of_prime in zip(scheme.primes, rules, strict=True)
    )


@functools.cache
def result_rules(scheme: Scheme, points: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """For each prime, the coefficients of the replies from these points."""
    return tuple(lagrange(points, 0, p) for p in scheme.primes)


@functools.cache
def _int16(rules: Hashable) -> Tensor:
    return torch.tensor(rules, dtype=torch.int16)


@functools.cache
def _primes(scheme: Scheme) -> Tensor:
    return torch.tensor(scheme.primes, dtype=torch.int32)


class _Encoding(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p), ("column", ctypes.c_void_p), ("n", ctypes.c_int64), ("width", ctypes.c_int64),
        ("room", ctypes.c_double), ("half", ctypes.c_double), ("primes", ctypes.c_void_p), ("L", ctypes.c_int64),
        ("drawn", ctypes.c_void_p), ("T", ctypes.c_int64), ("weights", ctypes.c_void_p), ("made", ctypes.c_int64),
        ("vectors", ctypes.c_void_p), ("checks", ctypes.c_int64), ("shares", ctypes.c_void_p),
        ("scales", ctypes.c_void_p), ("images", ctypes.c_void_p),
    ]  # fmt: skip


class _Decoding(ctypes.Structure):
    _fields_ = [
        ("replies", ctypes.c_void_p), ("needed", ctypes.c_int64), ("n", ctypes.c_int64), ("width", ctypes.c_int64),
        ("primes", ctypes.c_void_p), ("L", ctypes.c_int64), ("weights", ctypes.c_void_p), ("vectors", ctypes.c_void_p),
        ("checks", ctypes.c_int64), ("images", ctypes.c_void_p), ("scales", ctypes.c_void_p),
        ("column", ctypes.c_void_p), ("out", ctypes.c_void_p),
    ]  # fmt: skip


def _each(function: Callable[..., int], record: ctypes.Structure, n: int, width: int) -> int:
    """Call the kernel for all rows, on some threads; returns n, or a row before it at which it stopped."""
    pointer = ctypes.byref(record)
    threads = max(1, min(torch.get_num_threads(), n * width // _FEW_NUMBERS, n // 4))
    bounds = [n * i // threads // 4 * 4 for i in range(threads)] + [n]

    def rows(i: int) -> int:
        begin, end = bounds[i], bounds[i + 1]
        done = int(function(pointer, ctypes.c_int64(begin), ctypes.c_int64(end)))
        if done < 0:
            raise MemoryError("of the kernel's rows")
        return n if done >= end else done

    return min(on_threads(rows, threads))


def _pointers(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def _kernel_or_warning() -> ctypes.CDLL | None:
    found = kernel()
    if found is None:
        _warn_once()
    return found


@functools.cache
def _warn_once() -> None:
    warnings.warn(f"the C kernel of shares (obfuscatune/protocol/c) is not built: {BUILD_HINT}", stacklevel=4)
