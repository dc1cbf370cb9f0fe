"""Makes of the recordings of workers that hold shares the view that one of them has, or several that pool theirs.

One worker's numbers are residues modulo small primes; as an attack wants real numbers, it gets the integers that the
residues stand for by the Chinese remainder theorem, as parts of their modulus. Workers that pool shares at more points
than the threshold have the polynomials, and so the integers that were shared: rows and weights up to scales. A call's
rows cross in parts, which are put together here. The enclave's scales cross nowhere.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from obfuscatune.enclave.sharing.scheme import lagrange
from obfuscatune.studies.audit.view import ROLES, Call, Segment, WorkerView
from obfuscatune.studies.audit.wire import Frame, read_frames
from obfuscatune.worker.segments import LinearSegment


@dataclass(slots=True, repr=False)
class _Coalition:
    """Points and primes of the pooled shares, as the definitions tell them."""

    points: tuple[int, ...] = ()
    primes: tuple[int, ...] = ()
    segments: dict[str, Segment] = field(default_factory=dict)

    def read(self, shares: Sequence[Tensor], *, lifted: bool = False) -> Tensor:
        """Float64 numbers of the shares ``[L, ..]`` of each point: at 0 for several points, as they are for one.

        Args:
            lifted: whether the residues are times the inverse of M / p already, as those of weights and products are.
        """
        planes = []
        for i, p in enumerate(self.primes):
            factors = lagrange(self.points, 0, p) if len(self.points) > 1 else (1,)
            pairs = zip(factors, shares, strict=True)
            planes.append(torch.stack([c * share[i].long() for c, share in pairs]).sum(dim=0))
        if not lifted:
            planes = [
                plane * pow(math.prod(self.primes) // p, -1, p) for plane, p in zip(planes, self.primes, strict=True)
            ]
        return lift(planes, self.primes)

    def define(self, frames: Sequence[Frame]) -> None:
        """Note a weight; its block and role follow from the order, as in `audit.reader`."""
        specs = [frame.header["spec"] for frame in frames]
        self.points, self.primes = tuple(spec["point"] for spec in specs), tuple(specs[0]["primes"])
        block, role = divmod(len(self.segments), len(ROLES))
        weight = self.read([frame.tensors["weight"] for frame in frames], lifted=True)
        self.segments[frames[0].header["segment"]] = Segment(
            block, (ROLES[role],), LinearSegment({}, {"weight": weight}, {})
        )


def lift(planes: Sequence[Tensor], primes: Sequence[int]) -> Tensor:
    """Return the integers x of ``x (M / p)^-1`` mod p, from -M/2 to M/2, as parts of M: float64 in [-.5, .5]."""
    modulus = math.prod(primes)
    total = torch.zeros_like(planes[0])
    for plane, p in zip(planes, primes, strict=True):
        rest = modulus // p
        total = (total + plane.remainder(p) * rest) % modulus
    return torch.where(total > modulus // 2, total - modulus, total).double() / modulus


def read_shares(paths: Sequence[Path], texts: Sequence[tuple[int, int]]) -> WorkerView:
    """Decode the recordings of one worker, or of a coalition that has all of them.

    Args:
        texts: number and length, for each pass. Rows cross without the texts' bounds; an attacker is told them.
    """
    coalition = _Coalition()
    calls: list[Call] = []
    for found in zip(*(_pairs(path) for path in paths), strict=True):
        requests, replies = [request for request, _ in found], [reply for _, reply in found]
        if requests[0].header["op"] == "define":
            coalition.define(requests)
        elif requests[0].header["op"] == "multiply":
            calls.append(_call(coalition, requests, replies))
    passes: list[list[Call]] = []
    for before, call in pairwise([None, *_together(calls)]):
        if call is None:
            continue
        if before is None or before.backward != call.backward or _goes_back(before, call):
            passes.append([])
        passes[-1].append(call)
    pairs = zip(passes, texts, strict=True)
    split = tuple(tuple(_by_text(c, length) for c in calls) for calls, (_, length) in pairs)
    return WorkerView(coalition.segments, split, texts=tuple(texts))


def _pairs(path: Path) -> Iterator[tuple[Frame, Frame]]:
    """Requests with their replies, in the order of the requests' numbers, which is the same for all workers."""
    pending: dict[int, Frame] = {}
    for frame in read_frames(path):
        if frame.request:
            pending[frame.header["id"]] = frame
        elif (request := pending.pop(frame.header.get("id", -1), None)) is not None:
            yield request, frame


def _call(coalition: _Coalition, requests: Sequence[Frame], replies: Sequence[Frame]) -> Call:
    segment = coalition.segments[requests[0].header["segment"]]
    backward = bool(requests[0].header["transpose"])
    x = coalition.read([frame.tensors["x"] for frame in requests])
    if len(requests) == 1:
        y = coalition.read([frame.tensors["y"] for frame in replies], lifted=True)
    else:  # its polynomial has a higher degree than the factors', and these give it too
        weight = segment.weight(segment.roles[0])
        y = x @ (weight.T if backward else weight)
    return Call(
        segment=segment,
        header={"op": "backward" if backward else "forward"},
        inputs={"y" if backward else "x": x},
        outputs={"x" if backward else "y": y},
        started=requests[0].seconds,
        ended=replies[0].seconds,
        sent=requests[0].size,
        received=replies[0].size,
    )


def _together(calls: Sequence[Call]) -> Iterator[Call]:
    """Put parts of one call, which follow each other, into one."""
    parts: list[Call] = []
    for call in calls:
        if parts and (parts[0].segment is not call.segment or parts[0].backward != call.backward):
            yield _joined(parts)
            parts = []
        parts.append(call)
    if parts:
        yield _joined(parts)


def _joined(parts: Sequence[Call]) -> Call:
    first, last = parts[0], parts[-1]
    return Call(
        segment=first.segment,
        header=first.header,
        inputs={name: torch.cat([part.inputs[name] for part in parts]) for name in first.inputs},
        outputs={name: torch.cat([part.outputs[name] for part in parts]) for name in first.outputs},
        started=first.started,
        ended=last.ended,
        sent=sum(part.sent for part in parts),
        received=sum(part.received for part in parts),
    )


def _by_text(call: Call, length: int) -> Call:
    """The same with rows ``[texts, length, width]``."""
    inputs, outputs = (
        {name: torch.unflatten(rows, 0, (-1, length)) for name, rows in tensors.items()}
        for tensors in (call.inputs, call.outputs)
    )
    return replace(call, inputs=inputs, outputs=outputs)


def _goes_back(before: Call, call: Call) -> bool:
    """Whether a call begins another pass: layers come in order, and backward in reverse."""
    places = [c.segment.block * len(ROLES) + ROLES.index(c.segment.roles[0]) for c in (before, call)]
    return places[1] >= places[0] if call.backward else places[1] <= places[0]
