"""The enclave's books of the memory that it shares with a worker of this machine: who lies where, and until when.

A request's tensors lie there until its reply has come, a reply's until they are copied or read. A place is given back
when nothing refers to it any more, so that an interrupt or an error anywhere leaves none behind. Where there is no room
a tensor goes through the socket, as without all this.
"""

import math
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from obfuscatune.errors import ProtocolError
from obfuscatune.protocol.arena import LEAST_BYTES, Arena, Places
from obfuscatune.protocol.frames import TensorSpec

Expected = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def is_large(tensors: Mapping[str, Tensor], expected: Expected) -> bool:
    """Whether a request or its reply may have a tensor that is worth a place; cheap, as it is asked at every call."""
    sizes = [tensor.nbytes for tensor in tensors.values()]
    sizes += [math.prod(shape) * dtype.itemsize for shape, dtype in expected.values()]
    return max(sizes, default=0) >= LEAST_BYTES


class Place:
    """Bytes of the arena that somebody has, for as long as this object lives."""

    __slots__ = ("_freed", "offset")

    def __init__(self, offset: int, freed: deque[int]) -> None:
        self.offset, self._freed = offset, freed

    def __del__(self) -> None:
        self._freed.append(self.offset)  # and no lock: the collector may run in a thread that holds it


class Placed:
    """What one request has on the shelf.

    Attributes: ``sent``, places of its tensors, until the worker has read them; ``wanted``, of its reply's, by name.
    """

    def __init__(self, arena: Arena, sent: list[Place], wanted: dict[str, Place], size: int) -> None:
        self.sent, self.wanted, self.bytes_sent = sent, wanted, size
        self._arena = arena

    def found(self, rows: Any, expected: Expected) -> dict[str, Tensor]:
        """Return views of what the worker says it has put here, each with its place; it may change them at any time.

        Raises:
            ProtocolError: rows that are not what this enclave told it: the name, dtype, shape and place of each.
        """
        told = self._arena.read(rows)
        for name, tensor in told.items():
            if name not in self.wanted or self._arena.offset_of(tensor) != self.wanted[name].offset:
                raise ProtocolError("placed tensors of a reply", expected="where the request wants them")
            if (tuple(tensor.shape), tensor.dtype) != expected[name]:
                raise ProtocolError("placed tensors of a reply", expected="the shape and dtype that were asked for")
            tensor.place = self.wanted[name]  # type: ignore[attr-defined]
        return told


class Shelf:
    """An arena, and who has which bytes of it; for any number of threads."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self._places, self._lock = Places(arena.size), threading.Lock()
        self._freed: deque[int] = deque()  # offsets that nobody has any more, and `_places` does not know of yet

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """Return memory of it for a tensor, which has it until it goes; None for a small one, and where no room is."""
        spec = TensorSpec("", dtype, tuple(shape))
        place = self._place(spec.nbytes)
        if place is None:
            return None
        tensor = self.arena.view(spec, place.offset)
        tensor.place = place  # type: ignore[attr-defined]
        return tensor

    def place(
        self, tensors: Mapping[str, Tensor], expected: Expected
    ) -> tuple[dict[str, Tensor], dict[str, Any], Placed]:
        """Put a request's large tensors here, unless `take` made them, and find room for its reply's.

        Returns:
            the tensors that are sent as ever; fields of the request; what the request has here.
        """
        sent, rows, places, size = {}, [], [], 0
        for name, tensor in tensors.items():
            here = tensor if hasattr(tensor, "place") and self.arena.offset_of(tensor) is not None else None
            if here is None and (here := self.take(tensor.shape, tensor.dtype)) is not None:
                here.copy_(tensor.detach())
            if here is None:
                sent[name] = tensor
                continue
            rows.append(self.arena.row(name, here))
            places.append(here.place)
            size += here.nbytes
        lengths = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in expected.items()}
        found = {name: self._place(length) for name, length in lengths.items()}
        wanted = {name: place for name, place in found.items() if place is not None}
        fields: dict[str, Any] = {"placed": rows} if rows else {}
        if wanted:
            fields["places"] = {name: [place.offset, lengths[name]] for name, place in wanted.items()}
        return sent, fields, Placed(self.arena, places, wanted, size)

    def _place(self, length: int) -> Place | None:
        if length < LEAST_BYTES:
            return None
        with self._lock:
            while self._freed:
                self._places.free([self._freed.popleft()])
            offset = self._places.take(length)
            return None if offset is None else Place(offset, self._freed)
