"""The enclave's books of the memory that it shares with a worker of this machine: who lies where, and until when.

A request's tensors lie there until its reply has come, a reply's until they are copied or read. Where there is no room
a tensor goes through the socket, as without all this.
"""

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from obfuscatune.errors import ProtocolError
from obfuscatune.protocol.arena import LEAST_BYTES, Arena, Places
from obfuscatune.protocol.frames import TensorSpec

Expected = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def is_large(tensors: Mapping[str, Tensor], expected: Expected | None) -> bool:
    """Whether a request or its reply may have a tensor that is worth a place; cheap, as it is asked at every call."""
    sizes = [tensor.nbytes for tensor in tensors.values()]
    sizes += [math.prod(shape) * dtype.itemsize for shape, dtype in (expected or {}).values()]
    return max(sizes, default=0) >= LEAST_BYTES


class Placed:
    """What one request has on the shelf. Attributes: ``sent``, offsets of its tensors; ``wanted``, of its reply's."""

    def __init__(self, shelf: "Shelf", sent: list[int], wanted: dict[str, int], size: int) -> None:
        self.sent, self.wanted, self.bytes_sent = sent, wanted, size
        self._shelf = shelf

    def sent_is_read(self) -> None:
        """The reply has come, so that the worker has read what was sent."""
        self._shelf.free(self.sent)
        self.sent = []

    def found(self, rows: Any, expected: Expected) -> dict[str, Tensor]:
        """Return views of what the worker says it has put here; it may change them until `release`, and later.

        Raises:
            ProtocolError: rows that are not what this enclave told it: the name, dtype, shape and place of each.
        """
        told = self._shelf.arena.read(rows)
        for name, tensor in told.items():
            if name not in self.wanted or self._shelf.arena.offset_of(tensor) != self.wanted[name]:
                raise ProtocolError("placed tensors of a reply", expected="where the request wants them")
            if (tuple(tensor.shape), tensor.dtype) != expected[name]:
                raise ProtocolError("placed tensors of a reply", expected="the shape and dtype that were asked for")
        return told

    def release(self) -> None:
        """Nothing of it is read any more."""
        self.sent_is_read()
        self._shelf.free(self.wanted.values())
        self.wanted = {}


class Shelf:
    """An arena, and who has which bytes of it; for any number of threads."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self._places, self._lock = Places(arena.size), threading.Lock()

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """Return memory of it for a tensor; None for a small one, and where there is no room."""
        spec = TensorSpec("", dtype, tuple(shape))
        offset = self._offset(spec.nbytes)
        return None if offset is None else self.arena.view(spec, offset)

    def place(
        self, tensors: Mapping[str, Tensor], expected: Expected
    ) -> tuple[dict[str, Tensor], dict[str, Any], Placed]:
        """Put a request's large tensors here, and find room for its reply's.

        Returns:
            the tensors that are sent as ever; fields of the request; what the request has here.
        """
        sent, rows, offsets, size = {}, [], [], 0
        for name, tensor in tensors.items():
            place = tensor if self.arena.offset_of(tensor) is not None else self.take(tensor.shape, tensor.dtype)
            if place is None:
                sent[name] = tensor
                continue
            if place is not tensor:
                place.copy_(tensor.detach())
            row = self.arena.row(name, place)
            rows.append(row)
            offsets.append(row[3])
            size += place.nbytes
        wanted: dict[str, int] = {}
        lengths = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in expected.items()}
        for name, length in lengths.items():
            offset = self._offset(length)
            if offset is not None:
                wanted[name] = offset
        fields: dict[str, Any] = {"placed": rows} if rows else {}
        if wanted:
            fields["places"] = {name: [offset, lengths[name]] for name, offset in wanted.items()}
        return sent, fields, Placed(self, offsets, wanted, size)

    def free(self, offsets: "Sequence[int] | Any") -> None:
        """Give them back."""
        with self._lock:
            self._places.free(list(offsets))

    def _offset(self, length: int) -> int | None:
        if length < LEAST_BYTES:
            return None
        with self._lock:
            return self._places.take(length)
