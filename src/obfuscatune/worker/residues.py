"""Products of shares: int8 residues modulo small primes, exactly. What arrives is uniformly random, so is the reply.

A weight is ``[L, in, out]``, one plane for each of L primes; ``y_l = x_l w_l mod p_l``. Nothing is kept of a call.
"""

import functools
import hashlib
import math
import mmap
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from obfuscatune.errors import ProtocolError
from obfuscatune.protocol.pool import on_threads
from obfuscatune.protocol.residues import EXACT_TERMS, LARGEST, MOST_TERMS, PRIMES, reduce
from obfuscatune.worker.few_rows import few_rows
from obfuscatune.worker.pairs import pairs_product
from obfuscatune.worker.parallel import ALONE, Group
from obfuscatune.worker.segments import Segment

_ROWS_OF_A_PIECE = 64  # with fewer, most of its time goes to reading the weight again
_FEWEST_ROWS, _MULTIPLE = 17, 8  # what cuBLAS asks of an int8 product: more than 16 rows, widths in steps of 8


class ResidueSegment(Segment):
    """One weight's share.

    Args:
        spec: ``primes``; ``sharing``, the number of one sharing of a model, and the ``point`` at which it was taken.
        tensors: ``weight``.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        tensors: dict[str, Tensor],
        defined: Mapping[str, Segment],
        group: Group = ALONE,
    ) -> None:
        self.group = group
        primes, point = spec.get("primes"), spec.get("point")
        if not isinstance(primes, list) or not 1 <= len(primes) <= len(PRIMES) or not _are_different_primes(primes):
            raise ProtocolError("primes", got=ascii(primes)[:40], expected=f"some of {PRIMES}, each once")
        if type(point) is not int or not 0 < point < min(PRIMES):
            raise ProtocolError("point of a share", got=ascii(point)[:20], expected=f"1 to {min(PRIMES) - 1}")
        weight = tensors.get("weight")
        if set(tensors) != {"weight"} or weight is None or weight.ndim != 3 or len(weight) != len(primes):
            raise ProtocolError("weight of shares", got=sorted(tensors), expected="weight [primes, in, out]")
        if weight.dtype != torch.int8 or min(weight.shape) < 1 or max(weight.shape) > MOST_TERMS:
            raise ProtocolError("weight of shares", got=f"{list(weight.shape)} {weight.dtype}", expected="int8")
        if int(weight.max()) > LARGEST or int(weight.min()) < -LARGEST:
            raise ProtocolError("weight of shares", got="a number beyond a residue", expected=f"up to {LARGEST}")
        if group.rank == 0:  # whose process all sessions are forked from
            refuse_second_point(spec.get("sharing"), point)
        mine = group.share(len(primes))  # each process of a group computes for some of the primes
        self.primes, self.mine = primes, mine
        weight = weight if group.size == 1 else weight[mine.start : mine.stop].clone()
        self.weight, self.held = {"weight": weight}, {}
        # An accelerator's int8 product wants its right factor column by column, in both directions.
        self._turned = weight.mT.contiguous() if not weight.is_cpu else weight.mT
        self._int8 = uses_int8_products(weight.device)

    def shape_of_product(self, x: Tensor, *, transpose: bool) -> tuple[int, ...]:
        """Return the shape of `multiply`'s result. Raises ProtocolError where the weight does not fit to x."""
        weight = self.weight["weight"]
        inputs, outputs = weight.shape[1:] if not transpose else (weight.shape[2], weight.shape[1])
        if x.dtype != torch.int8 or x.ndim != 3 or (x.shape[0], x.shape[2]) != (len(self.primes), inputs):
            expected = f"int8 [{len(self.primes)}, rows, {inputs}]"
            raise ProtocolError("rows of shares", got=f"{list(x.shape)} {x.dtype}", expected=expected)
        return (*x.shape[:2], outputs)

    def multiply(self, x: Tensor, *, transpose: bool, out: Tensor | None = None) -> Tensor:
        """Return ``x W mod p`` int8 ``[L, rows, out]``, or with the transpose, for x int8 ``[L, rows, in]``.

        Args:
            out: where it is put, if given.
        """
        shape = self.shape_of_product(x, transpose=transpose)
        columns = self.weight["weight"].mT if transpose else self._turned.mT
        if self.group.size > 1:
            y = torch.zeros(shape, dtype=torch.int8, device=x.device)  # the planes of the others, to be added
        else:
            y = torch.empty(shape, dtype=torch.int8, device=x.device) if out is None else out
            if not transpose and few_rows(x, self.weight["weight"], self.primes, y):
                return y
        threads = torch.get_num_threads() if x.is_cpu else 1
        parts = parts_of(range(self.mine.start, self.mine.stop), shape[1], threads)
        threads = max(1, min(threads, len(parts)))  # of a large group some processes have no plane

        def some(thread: int) -> None:
            """One thread's parts, one after the other: products that share their threads wait for each other's."""
            most = max((rows.stop - rows.start for _, rows in parts), default=0)
            if self._int8 and x.is_cpu:
                room = torch.empty(most, shape[2], dtype=torch.int32)  # for all: new memory costs faults
            for i, rows in parts[len(parts) * thread // threads : len(parts) * (thread + 1) // threads]:
                left, plane = x[i, rows], columns[i - self.mine.start]
                if not self._int8 and pairs_product(left, plane, self.primes[i], y[i, rows]):
                    continue
                if not self._int8 or x.shape[2] == 1:  # torch 2.13 leaves the int8 product of one term unwritten
                    sums = float_product(left, plane)
                elif x.is_cpu:
                    sums = room[: len(left)]
                    torch._int_mm(left, plane, out=sums)
                else:
                    sums = int8_product(left, plane)
                reduce(sums, self.primes[i], out=y[i, rows])

        on_threads(some, threads)
        return y if self.group.size == 1 else self.group.sum_(y)


def _are_different_primes(primes: list[Any]) -> bool:
    return all(type(p) is int and p in PRIMES and primes.count(p) == 1 for p in primes)


def parts_of(planes: range, rows: int, threads: int) -> list[tuple[int, slice]]:
    """Return parts of a product: planes, cut into so many pieces of their rows that all threads have as much to do."""
    pieces = max(1, min(threads // math.gcd(threads, len(planes)), rows // _ROWS_OF_A_PIECE))
    bounds = [rows * i // pieces for i in range(pieces + 1)]
    return [(plane, slice(bounds[i], bounds[i + 1])) for plane in planes for i in range(pieces)]


def refuse_second_point(sharing: Any, point: int) -> None:
    """Refuse another point of a sharing that a session of this worker has, or had, a point of: two are the secret.

    The enclave sees to it that no operator gets two; this is the second line, for one who started one worker twice. The
    table is shared by all processes that the worker forks, and forgets after some thousands of sharings. It does not
    know who defined a point: another operator of the sharing whom this worker lets in can have it refused here.
    """
    if not isinstance(sharing, str) or not 16 <= len(sharing) <= 64:
        raise ProtocolError("number of a sharing", got=type(sharing).__name__, expected="16 to 64 characters")
    digest = hashlib.sha256(sharing.encode()).digest()[:_ENTRY]
    first = int.from_bytes(digest, "big")
    places = [(first + t) % _ENTRIES * _ENTRY for t in range(min(PRIMES))]  # one for each point
    for _ in range(2):  # looked at again after it is there, because another process may do the same
        if any(_POINTS[at : at + _ENTRY] == digest for t, at in enumerate(places) if t != point):
            raise ProtocolError("a second point of one sharing", expected="each point at a worker of its own")
        _POINTS[places[point] : places[point] + _ENTRY] = digest


_ENTRY, _ENTRIES = 8, 1 << 16
_POINTS = mmap.mmap(-1, _ENTRY * _ENTRIES)  # MAP_SHARED


def int8_product(x: Tensor, w: Tensor) -> Tensor:
    """Return ``x w`` int32 ``[n, m]`` of int8 ``[n, k]`` and ``[k, m]``, in one int8 product of the device."""
    if x.is_cpu:
        return torch._int_mm(x, w)
    (n, k), m = x.shape, w.shape[1]
    if k % _MULTIPLE or m % _MULTIPLE:
        return float_product(x, w)
    if n < _FEWEST_ROWS:
        x = torch.cat([x, x.new_zeros(_FEWEST_ROWS - n, k)])
    return torch._int_mm(x, w)[:n]


def float_product(x: Tensor, w: Tensor) -> Tensor:
    """Return the same by float32 products of at most `EXACT_TERMS` terms, each exact."""
    y = torch.zeros(x.shape[0], w.shape[1], dtype=torch.int32, device=x.device)
    for start in range(0, x.shape[1], EXACT_TERMS):
        part = slice(start, start + EXACT_TERMS)
        y += (x[:, part].float() @ w[part].float()).int()
    return y


@functools.cache
def uses_int8_products(device: torch.device) -> bool:
    """Say whether products of shares are int8 products there: if they are exact, and not slower than float32's.

    All ways give the same bits, so that a wrong guess costs time alone.
    """
    return (device.type != "cpu" or _int8_products_are_fast()) and int8_products_are_exact(device)


def _int8_products_are_fast() -> bool:
    """Compare a small product with `float_product`: with VNNI it takes a fifth of the time, without it forty times."""
    x, w = torch.ones(32, 256, dtype=torch.int8), torch.ones(256, 256, dtype=torch.int8)
    int8 = floats = math.inf
    for _ in range(5):  # in turn, of which the best counts: other programs may hold up one or the other
        start = time.perf_counter()
        try:
            torch._int_mm(x, w)
        except RuntimeError:  # a build of torch without it
            return False
        middle = time.perf_counter()
        float_product(x, w)
        int8, floats = min(int8, middle - start), min(floats, time.perf_counter() - middle)
    return int8 <= floats


def int8_products_are_exact(device: torch.device) -> bool:
    """Say whether the device's int8 product is right on the extreme residues; some have none, some saturate in silence.

    Source: oneDNN's notes on int8 for CPUs without VNNI; pytorch#136746, pytorch#187094.
    """
    signs = torch.tensor([1, -1], dtype=torch.int8)
    for rows, terms, columns in ((1, 64, 64), (4, 768, 64), (32, 4096, 72)):
        pattern = torch.arange(rows * terms).view(rows, terms)
        # All sums as large as they get, and signs that change with rows and columns.
        x = (LARGEST * signs[pattern // terms % 2]).to(device)
        w = (LARGEST * signs[torch.arange(columns) % 2]).expand(terms, -1).contiguous().to(device)
        # And numbers of all sizes.
        ramp = (pattern * 37 % (2 * LARGEST + 1) - LARGEST).to(torch.int8).to(device)
        slope = ((torch.arange(terms * columns) * 53 % (2 * LARGEST + 1)) - LARGEST).to(torch.int8)
        slope = slope.view(terms, columns).to(device)
        for left, right in ((x, w), (ramp, slope), (x, slope), (ramp, w)):
            true = (left.double() @ right.double()).int()
            for layout in (right, right.T.contiguous().T):
                try:
                    if not torch.equal(int8_product(left, layout), true):
                        return False
                except RuntimeError:
                    return False
    return True
