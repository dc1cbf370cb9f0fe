"""Replies of a worker: a request under way, and what its reply must be before anything of it is used."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from obfuscatune.enclave.keys.source import Secret
from obfuscatune.enclave.shelf import Expected, Placed
from obfuscatune.errors import NotFiniteError, ProtocolError
from obfuscatune.protocol.arena import own
from obfuscatune.protocol.connection import Frame

if TYPE_CHECKING:
    from obfuscatune.enclave.session import Session


class Pending(Secret):
    """A request under way. Attributes: ``op``; ``layer``, for messages; ``id``: the number of the call."""

    def __init__(
        self, session: "Session", op: str, layer: str, number: int, expected: Expected, optional: Expected
    ) -> None:
        self.op, self.layer, self.id = op, layer, number
        self._session, self._expected, self._optional = session, expected, optional
        self._frame: Frame | None = None
        self.placed: Placed | None = None  # what it has in the memory that it shares with a worker of this machine

    @property
    def most(self) -> int:
        """Bytes of the reply's tensors: a worker may not make the enclave allocate more than it asked for."""
        both = (*self._expected.values(), *self._optional.values())
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in both)

    @property
    def has_come(self) -> bool:
        """Whether the reply is there, so that `result` will not wait."""
        return self._frame is not None

    def take(self, frame: Frame) -> None:
        """Take what the worker sent in this request's turn, not yet checked."""
        if self.placed is not None:
            self.placed.sent = []  # the worker has read it
        self._frame = frame

    def result(self, *, in_place: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Wait for the reply, and return it checked: fields and tensors. To be called once, by any thread.

        Args:
            in_place: leave integers in shared memory, where the worker can change them still: for a caller that reads
                each of them once. They keep their places there until they go.

        Raises:
            WorkerFault: naming worker, layer and call.
            NotFiniteError: a number of the reply is not finite, which an honest worker's may be; the session goes on.
            UsageError: the session has ended meanwhile, by a fault that was raised elsewhere.
        """
        if self._frame is None:
            self._session.await_reply(self)
        frame, self._frame = self._frame, None
        if frame is None:
            raise RuntimeError("a reply that was taken before")
        tensors = self._tensors(frame, in_place)
        fault = fault_of(frame.fields, tensors, self.id, self._expected, self._optional)
        if fault is not None:
            what, details = fault
            raise self._session.fault(what, self.layer, call=self.id, **details)
        try:
            refuse_not_finite(tensors, self.layer, "of what comes back from the worker")
        except NotFiniteError:
            if self.op == "forward":  # which the worker may have kept for a backward that will not come
                self._session.drop("calls", self.id)
            raise
        return frame.fields, tensors

    def _tensors(self, frame: Frame, in_place: bool) -> dict[str, Tensor]:
        placed, self.placed = self.placed, None
        if placed is None:
            return frame.tensors
        try:
            found = placed.found(frame.fields.pop("placed", []), self._expected or {})
            if not found.keys().isdisjoint(frame.tensors):
                raise ProtocolError("placed tensors of a reply", expected="others than those that are sent")
            if not in_place or any(tensor.is_floating_point() for tensor in found.values()):
                found = own(found)
        except ProtocolError as error:
            details = {"got": error.what, "expected": error.expected}
            raise self._session.fault("the reply breaks the protocol", self.layer, call=self.id, **details) from error
        self._session.traffic.add(self.op, bytes_received=sum(tensor.nbytes for tensor in found.values()))
        return {**found, **frame.tensors}


def fault_of(
    reply: Mapping[str, Any], outputs: Mapping[str, Tensor], call: int, expected: Expected, optional: Expected
) -> tuple[str, dict[str, Any]] | None:
    """Say what is wrong with the reply to a call, with details for the error; None for nothing."""
    if reply.get("ok") is not True:
        # The worker's own words: nothing of it may steer a terminal.
        got = ascii(reply.get("message", "no message"))[:300]
        return "the worker refused the request", {"got": got, "hint": "the worker runs, and may be serving others"}
    if reply.get("id") != call:
        return "reply to another call", {"got": ascii(reply.get("id"))[:20], "expected": call}
    known = {**optional, **expected}
    if not set(expected) <= set(outputs) <= set(known):
        missing, strange = sorted(set(expected) - set(outputs)), sorted(set(outputs) - set(known))
        return "tensors of the reply", {"got": f"{strange[:8]} too many, {missing[:8]} missing"}
    for name, tensor in outputs.items():
        shape, dtype = known[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            got = f"{list(tensor.shape)} {tensor.dtype}"
            return f"shape or dtype of {name}", {"got": got, "expected": f"{list(shape)} {dtype}"}
    return None


def refuse_not_finite(tensors: Mapping[str, Tensor], layer: str, which: str = "of the enclave") -> None:
    """Raise NotFiniteError where a number is NaN or infinite: sent, it would come back so from an honest worker."""
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise not_finite(layer, f"NaN or infinity in {name}", which)


def not_finite(layer: str, got: str, which: str = "of the enclave") -> NotFiniteError:
    """Return what numbers that are not finite are refused with; ``which``: whose they are."""
    return NotFiniteError(
        f"numbers {which} are not finite",
        got=got,
        where=layer,
        hint="weights or inputs too large for the dtype, or a training run that diverged; none of it is used",
    )


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite; one pass in the common case: a sum is, unless a term is not or it overflows."""
    return not tensor.is_floating_point() or math.isfinite(tensor.sum()) or bool(torch.isfinite(tensor).all())
