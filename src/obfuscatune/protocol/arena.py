"""Memory that enclave and worker share where both are on one machine: large tensors need not cross a socket then.

The enclave makes it, a memfd of a fixed size, and passes its descriptor over the unix socket; it alone says what lies
where. One session has one arena, so what lies in it is what would have crossed its socket, and nothing else: requests
and replies. Both sides can change every byte at any time, so each reads a byte once, or copies before it looks.
"""

import fcntl
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from obfuscatune.errors import ProtocolError
from obfuscatune.protocol.frames import DTYPES, TensorSpec, check_bools, read_table
from obfuscatune.protocol.limits import DEFAULT_LIMITS

LEAST_BYTES = 64 * 1024  # smaller tensors go through the socket: that takes some 20 us
ARENA_BYTES = 1 << 29  # of address space; a page takes memory once it is written to
MOST_BYTES = 1 << 30
PLACED = ("forward", "backward", "multiply")  # operations that use it: the others are rare, or keep what they get
ALIGNMENT = 64  # of every offset: a cache line, and any dtype
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Arena:
    """The bytes, as one side sees them. They stay mapped as long as a tensor in them lives.

    Args:
        descriptor: of the memory, which stays the caller's.

    Raises:
        RuntimeError: it cannot be mapped.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        # Python's own mmap would keep a descriptor for each.
        self._bytes = torch.from_file(f"/proc/self/fd/{descriptor}", shared=True, size=size, dtype=torch.uint8)
        self._start, self.size = self._bytes.data_ptr(), size

    @classmethod
    def create(cls, size: int = ARENA_BYTES) -> "tuple[Arena, int] | None":
        """Return a new one, and its descriptor, which is the caller's to close; None where the system has none."""
        if not hasattr(os, "memfd_create"):
            return None
        try:
            descriptor = os.memfd_create("obfuscatune", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError:  # as in a library OS of an enclave
            return None
        try:
            os.ftruncate(descriptor, size)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
            return cls(descriptor, size), descriptor
        except (OSError, RuntimeError):
            os.close(descriptor)
            return None

    @classmethod
    def received(cls, descriptor: int, size: Any) -> "Arena | None":
        """Return the one that the enclave made, and close the descriptor; None where this system cannot map it.

        Raises:
            ProtocolError: it is no memfd of this size that can no longer change its size: a mapping beyond the end of a
                file that was cut kills the process that reads it.
        """
        try:
            if type(size) is not int or not 0 < size <= MOST_BYTES:
                raise ProtocolError("size of an arena", expected=f"1 to {MOST_BYTES} bytes")
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
            if seals & _SEALS != _SEALS or os.fstat(descriptor).st_size != size:
                raise ProtocolError("descriptor of an arena", expected=f"a sealed memfd of {size} bytes")
            return cls(descriptor, size)
        except OSError:  # a descriptor of something else
            raise ProtocolError("descriptor of an arena", expected="a memfd") from None
        except RuntimeError:  # no /proc here, or a policy against it
            return None
        finally:
            os.close(descriptor)

    def view(self, spec: TensorSpec, offset: Any) -> Tensor:
        """Return a tensor that lies there, not copied. Raises ProtocolError where it would not lie in the arena."""
        if type(offset) is not int or offset % ALIGNMENT or not 0 <= offset <= self.size - spec.nbytes:
            raise ProtocolError("place of a tensor", expected=f"a multiple of {ALIGNMENT}, within the arena")
        return self._bytes[offset : offset + spec.nbytes].view(spec.dtype).view(spec.shape)

    def offset_of(self, tensor: Tensor) -> int | None:
        """Return where a contiguous tensor lies; None where it is not in the arena."""
        offset = tensor.data_ptr() - self._start
        return offset if 0 <= offset < self.size and tensor.is_contiguous() else None

    def read(self, rows: Any) -> dict[str, Tensor]:
        """Return views of the tensors of a table that the other side sent, rows ``[name, dtype, shape, offset]``.

        Raises:
            ProtocolError: the table breaks a rule of a frame's tensor table, or a place is not in the arena.
        """
        if type(rows) is not list or not all(type(row) is list and len(row) == 4 for row in rows):
            raise ProtocolError("table of placed tensors", expected="a list of [name, dtype, shape, offset]")
        specs, total = read_table([row[:3] for row in rows], DEFAULT_LIMITS)
        if total > self.size:  # each is within the arena, but they may overlap, and all may be copied
            raise ProtocolError("placed tensors are too long together", expected=f"at most {self.size} bytes")
        return {spec.name: self.view(spec, row[3]) for spec, row in zip(specs, rows, strict=True)}

    def row(self, name: str, tensor: Tensor) -> list[Any]:
        """Return the row of such a table for a tensor that lies here."""
        return [name, _NAMES[tensor.dtype], list(tensor.shape), self.offset_of(tensor)]


def own(tensors: Mapping[str, Tensor], *, pin_memory: bool = False) -> dict[str, Tensor]:
    """Return copies of views, which the other side cannot change any more, in page-locked memory where asked.

    Raises:
        ProtocolError: as a frame would.
    """
    copies = {n: torch.empty(t.shape, dtype=t.dtype, pin_memory=pin_memory).copy_(t) for n, t in tensors.items()}
    for tensor in copies.values():
        if tensor.dtype is torch.bool:
            check_bools(tensor.view(torch.uint8).numpy())
    return copies


_SEALS: int = 0
if hasattr(fcntl, "F_SEAL_SHRINK"):
    _SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Places:
    """Which bytes of an arena are taken: first fit, so that what is touched stays small. For one thread at a time."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._taken: dict[int, int] = {}  # ends by beginnings

    def take(self, length: int) -> int | None:
        """Return the offset of so many bytes that nobody has; None where no gap holds them."""
        beginning = 0
        for taken, end in sorted(self._taken.items()):
            if taken - beginning >= length:
                break
            beginning = end
        if self._size - beginning < length:
            return None
        self._taken[beginning] = -(-(beginning + length) // ALIGNMENT) * ALIGNMENT
        return beginning

    def free(self, offsets: Sequence[int]) -> None:
        """Give them back."""
        for offset in offsets:
            del self._taken[offset]
