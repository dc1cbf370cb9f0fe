"""Tensors of requests and replies in memory that an enclave of this machine shares: the worker's side of an arena."""

import os
from typing import Any

import torch
from torch import Tensor

from obfuscatune.errors import ProtocolError
from obfuscatune.protocol.arena import Arena, own
from obfuscatune.protocol.connection import Connection
from obfuscatune.protocol.frames import TensorSpec
from obfuscatune.worker.budget import Ledger
from obfuscatune.worker.transfer import pins

Reply = tuple[dict[str, Any], dict[str, Tensor]]


class Shelf:
    """Reads and places the tensors of one session.

    Args:
        passing: the connection that an enclave of this machine can pass an arena over; None: it is offered none.
        ledger: of the session, whose budget bounds the arena. device: where the requests' tensors go next.
    """

    def __init__(self, passing: Connection | None, ledger: Ledger, device: torch.device) -> None:
        self._passing, self._ledger, self._device = passing, ledger, device
        self._arena: Arena | None = None
        if passing is not None:
            passing.expect_descriptor()

    @property
    def is_offered(self) -> bool:
        """Whether an enclave may pass an arena."""
        return self._passing is not None

    def take(self, header: dict[str, Any], tensors: dict[str, Tensor]) -> Reply:
        """Map the enclave's arena; say that it did not come where something between the two passes bytes alone."""
        descriptor = None if self._passing is None else self._passing.take_descriptor()
        if descriptor is None:
            return {"mapped": False}, {}
        if self._arena is not None:
            os.close(descriptor)
            raise ProtocolError("a second arena", expected="one for a session")
        arena = Arena.received(descriptor, header.get("bytes"))
        if arena is not None and (self._ledger.budget is None or arena.size <= self._ledger.budget):
            self._arena = arena
        return {"mapped": self._arena is not None}, {}

    def read(self, header: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a request's tensors in the arena: copies, unless the operation is done with them when it answers.

        A product and a backward are, and a forward that keeps nothing is with its rows.

        Args:
            tensors: those that were sent, whose names are taken.
        """
        views = self._mapped().read(header["placed"])
        if not views.keys().isdisjoint(tensors):
            raise ProtocolError("placed tensors", got=sorted(views), expected="others than those that are sent")
        in_place = header["op"] != "forward" or not header.get("keep")
        read = {
            name: tensor
            for name, tensor in views.items()
            if in_place and tensor.dtype is not torch.bool and (header["op"] != "forward" or name[:2] in ("x", "u."))
        }
        kept = {name: tensor for name, tensor in views.items() if name not in read}
        return {**read, **own(kept, pin_memory=pins(self._device))}

    def place(self, header: dict[str, Any], reply: dict[str, Any], outputs: dict[str, Tensor]) -> Reply:
        """Put a reply's tensors where the enclave wants them; what has another size than it expects is sent."""
        arena, sent, rows = self._mapped(), {}, []
        for name, tensor in outputs.items():
            place = self.place_of(header, name, tensor.dtype, tuple(tensor.shape))
            if place is None:
                sent[name] = tensor
                continue
            if place.data_ptr() != tensor.data_ptr():
                place.copy_(tensor)
            rows.append(arena.row(name, place))
        return {**reply, "placed": rows}, sent

    def place_of(self, header: dict[str, Any], name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor | None:
        """Return where the enclave wants a tensor of the reply; None where it says nothing of it, or another size."""
        places = header.get("places", {})
        if not isinstance(places, dict) or not all(type(p) is list and len(p) == 2 for p in places.values()):
            raise ProtocolError("places of a reply", expected="[offset, bytes] by name")
        spec = TensorSpec(name, dtype, shape)
        offset, length = places.get(name, (None, None))
        return self._mapped().view(spec, offset) if length == spec.nbytes else None

    def _mapped(self) -> Arena:
        if self._arena is None:
            raise ProtocolError("placed tensors", expected="an arena that was passed before")
        return self._arena
