r"""One worker on several devices: tensor parallel processes that torchrun starts, each with its part of every weight.

A part of a block is split as its first layers' columns and its last layer's rows: by heads, and by neurons. Then
nothing crosses between the two products, and each process's result is a term of a sum:

    y = sum_r f(x W1[:, r]) W2[r, :]

:meth:`Group.enter` stands before a part, :meth:`Group.leave` behind it: one is the identity and sums gradients, the
other one sums results and is the identity of gradients. LoRA factors are whole in every process and enter likewise.
All processes run the same operations in the same order. Rank 0 speaks the protocol and hands every request on.

DTensor describes the products, but not what is around them here: LoRA slots, windows of KV buffers written in place,
bits of masks. So the two collectives stand where they are needed. Source: Shoeybi et al., "Megatron-LM", arXiv
1909.08053.
"""

import logging
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from obfuscatune.errors import ProtocolError
from obfuscatune.protocol.frames import PREFIX, TensorSpec, decode_header, decode_prefix, encode_head
from obfuscatune.worker.torchrun import rank_and_size

logger = logging.getLogger(__name__)

_THINKING = timedelta(days=30)  # between two requests an enclave takes as long as it likes
_COMPUTING = timedelta(minutes=5)  # within one of them no process waits longer for another
_PROBE = timedelta(seconds=0.5)
_ENDS = {signal.SIGINT, signal.SIGTERM}  # what torchrun ends its processes by
_STAYING_SECONDS = (
    10.0  # of who has lost the others: rank 0 is finding out who is gone, by whose connections are closed
)


class GroupError(Exception):
    """A process of the group is gone, or does not answer: the session cannot go on."""


@dataclass(frozen=True, slots=True)
class Split:
    """This process's share of ``n`` numbers in order: ``[start, stop)``."""

    start: int
    stop: int


class Group:
    """The processes of a worker; one alone, where there are no others.

    Attributes: ``rank``, ``size``.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        *,
        requests: Any = None,
        contents: Any = None,
        products: Any = None,
        pairs: Sequence[Any] = (),
    ) -> None:
        self.rank, self.size = rank, size
        self._requests, self._contents, self._products, self._pairs = requests, contents, products, pairs

    @classmethod
    def join(cls, device: torch.device, *, session: int | None = None) -> "Group":
        """Meet the other processes for one session, and return their group.

        Args:
            session: the number of the session to wait for; None: the next one, which this process, rank 0, opens.
        """
        rank, size = rank_and_size()
        store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False
        )
        if session is None:
            session = store.add("obfuscatune sessions", 1)
            store.set(f"obfuscatune session {session}", "open")
        else:
            _wait_for_session(store, session)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=torch.distributed.PrefixStore(  # type: ignore[attr-defined]
                f"obfuscatune {session}", store
            ),
            rank=rank,
            world_size=size,
            timeout=_COMPUTING,
        )
        # Requests are handed on by gloo even beside GPUs: a wait of hours must not keep one of them busy.
        requests = dist.new_group(backend="gloo", timeout=_THINKING)
        # What a request holds follows its length at once: a process that does not take it has stopped.
        contents = dist.new_group(backend="gloo", timeout=_COMPUTING)
        # Of rank 0 with each of the others, to find out which of them is gone.
        pairs = [dist.new_group([0, other], backend="gloo", timeout=_PROBE) for other in range(1, size)]
        return cls(rank, size, requests=requests, contents=contents, products=dist.group.WORLD, pairs=pairs)

    def leave_session(self) -> None:
        """Let the followers go, and end the group."""
        if self.size == 1:
            return
        try:
            if self.rank == 0:
                dist.broadcast(torch.zeros(1, dtype=torch.int64), 0, group=self._requests)
        except RuntimeError:
            pass  # they are gone
        finally:
            dist.destroy_process_group()

    # requests

    def hand_on(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Send a request to the other processes. Raises GroupError."""
        if self.size == 1 or self.rank:
            return
        specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        head, _ = encode_head(header, specs)
        try:
            dist.broadcast(torch.tensor([len(head)]), 0, group=self._requests)
            dist.broadcast(torch.frombuffer(bytearray(head), dtype=torch.uint8), 0, group=self._contents)
            for tensor in tensors.values():
                if tensor.numel():
                    dist.broadcast(_bytes_of(tensor), 0, group=self._contents)
        except RuntimeError as error:
            raise self.lost() from error

    def take(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Wait for the next request of rank 0; None at the session's end. Raises GroupError."""
        try:
            length = torch.zeros(1, dtype=torch.int64)
            dist.broadcast(length, 0, group=self._requests)
            if not length.item():
                return None
            head = torch.empty(int(length.item()), dtype=torch.uint8)
            dist.broadcast(head, 0, group=self._contents)
            raw = head.numpy().tobytes()
            fields, specs = decode_header(raw[PREFIX.size :], decode_prefix(raw[: PREFIX.size])[1])
            tensors = {spec.name: torch.empty(spec.shape, dtype=spec.dtype) for spec in specs}
            for tensor in tensors.values():
                if tensor.numel():
                    dist.broadcast(_bytes_of(tensor), 0, group=self._contents)
        except RuntimeError as error:
            raise GroupError("rank 0 is gone") from error
        return fields, tensors

    # shares

    def share(self, n: int) -> Split:
        """This process's share of ``n`` heads, neurons or columns."""
        return Split(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def enter(self, x: Tensor) -> Tensor:
        """Return x, the same in all processes; its gradient is the sum of theirs."""
        if self.size == 1:
            return x
        entered: Tensor = _Enter.apply(x, self)  # type: ignore[no-untyped-call]
        return entered

    def leave(self, y: Tensor) -> Tensor:
        """Return the sum of y over all processes; the gradient of each is that of the sum."""
        if self.size == 1:
            return y
        left: Tensor = _Leave.apply(y, self)  # type: ignore[no-untyped-call]
        return left

    def once(self, y: Tensor) -> Tensor:
        """Return y in one process and zeros in the others: a term that all of them know, of a sum over them."""
        return y if self.size == 1 else y * (self.rank == 0)

    def sum_(self, y: Tensor) -> Tensor:
        """Sum y over all processes, in place. Raises GroupError."""
        try:
            dist.all_reduce(y, group=self._products)
        except RuntimeError as error:
            raise self.lost() from error
        return y

    def lost(self) -> GroupError:
        """Return the error that names who is gone, as far as it can be found out: one who closes what we send to."""
        for other, pair in enumerate(self._pairs if self.rank == 0 else (), start=1):
            try:
                dist.send(torch.zeros(1), other, group=pair)
            except RuntimeError as error:
                if "imed out" not in str(error):  # who lives does not take it, within the time of the probe
                    return GroupError(f"rank {other} of the worker is gone")
        return GroupError("a rank of the worker is gone")


ALONE = Group()


def _wait_for_session(store: Any, session: int) -> None:
    """Wait for rank 0 to open a session. Here, and nowhere else, torchrun's signals end this process.

    torchrun ends all processes as soon as it sees that one has died. Rank 0 then still has to find out which one, by
    whose connections are closed, so the living ones stay to the end of the session.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDS)
    store.wait([f"obfuscatune session {session}"], _THINKING)
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.group.sum_(grad.clone(memory_format=torch.contiguous_format)), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, group: Group) -> Tensor:
        return group.sum_(y.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def ends_the_group(error: Exception) -> GroupError | None:
    """Return the error that ends a session after ``error``, None where the session can go on.

    A request that breaks the protocol fails alike in all processes. Any other failure may be this process's alone, and
    then the others wait for it.
    """
    if isinstance(error, GroupError):
        return error
    return None if isinstance(error, ProtocolError) else GroupError(f"{type(error).__name__} in one rank of the worker")


def follow(device: torch.device, serve: Callable[[Group], None]) -> None:
    """Be a process that is not rank 0: session after session, for ever.

    Args:
        serve: does what rank 0 hands on, to the end of one session.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)  # before there are threads: none of them is to get it either
    session = 0
    while True:
        session += 1
        group = Group.join(device, session=session)
        try:
            serve(group)
        except GroupError as error:
            logger.warning("session %d: %s", session, error)
            time.sleep(_STAYING_SECONDS)
        finally:
            group.leave_session()
