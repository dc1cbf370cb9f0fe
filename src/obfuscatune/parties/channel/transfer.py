"""Files across the channel, in pieces of at most 4 MiB: one request a piece, each with its offset and the whole size.

    upload:    request {..., "offset", "size"} + piece     reply {...}
    download:  request {..., "offset"}                     reply {"size"} + piece

The pieces say where they belong, so a transfer that broke off goes on where it stopped.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from obfuscatune.errors import ProtocolError, UsageError
from obfuscatune.parties.channel.client import AttestedChannel
from obfuscatune.parties.channel.frames import MAX_PIECE_BYTES

_NAMES = ("offset", "size")


@dataclass(frozen=True)
class Piece:
    """A part of an upload as the enclave gets it: bytes [offset, offset + len(data)) of a file of ``size``."""

    offset: int
    size: int
    data: bytes

    @classmethod
    def of(cls, fields: Mapping[str, Any], data: bytes, *, max_bytes: int) -> "Piece":
        """Return the piece of a request.

        Raises:
            UsageError: no offset and size, a file longer than ``max_bytes``, a piece beyond its end, or an empty one
                of a file that is not empty.
        """
        offset, size = (fields.get(name) for name in _NAMES)
        if type(offset) is not int or type(size) is not int or offset < 0 or size < 0:
            raise UsageError("not a piece of a file", expected="integers offset and size")
        if size > max_bytes:
            raise UsageError("file is too long", got=f"{size} bytes", expected=f"at most {max_bytes}")
        if offset + len(data) > size or (not data and size):
            raise UsageError("piece does not fit into the file", got=f"{len(data)} bytes at {offset} of {size}")
        return cls(offset, size, data)

    @property
    def is_last(self) -> bool:
        """Whether the file ends with this piece."""
        return self.offset + len(self.data) == self.size


def upload(
    channel: AttestedChannel,
    fields: Mapping[str, Any],
    source: BinaryIO,
    size: int,
    *,
    start: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Send bytes [start, size) of ``source``, and return the fields of the last reply.

    Args:
        channel: to the enclave.
        fields: of every request; ``offset`` and ``size`` come with them.
        source: seekable, of ``size`` bytes.
        size: in bytes.
        start: where an earlier try stopped.
        progress: called with the number of bytes of each piece that was taken.

    Raises:
        UsageError: the file is shorter than it was said to be.
        ObfuscatuneError: as `AttestedChannel.request`.
    """
    source.seek(start)
    offset = start
    while True:
        data = source.read(min(MAX_PIECE_BYTES, size - offset))
        if not data and offset < size:
            raise UsageError("file became shorter while it was sent", got=offset, expected=size)
        reply, _ = channel.request({**fields, "offset": offset, "size": size}, data)
        offset += len(data)
        if progress is not None:
            progress(len(data))
        if offset >= size:
            return reply


def download(
    channel: AttestedChannel,
    fields: Mapping[str, Any],
    target: BinaryIO,
    *,
    max_bytes: int,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write a file of the enclave into ``target``, and return its size in bytes.

    Raises:
        ProtocolError: pieces that make no file of one size of at most ``max_bytes``; what was written is of no use.
        ObfuscatuneError: as `AttestedChannel.request`.
    """
    offset, size = 0, None
    while size is None or offset < size:
        reply, data = channel.request({**fields, "offset": offset})
        told = reply.get("size")
        if type(told) is not int or not 0 <= told <= max_bytes or size not in (None, told):
            raise ProtocolError("enclave names no usable size", expected=f"one size, at most {max_bytes} bytes")
        size = told
        if offset + len(data) > size or (not data and offset < size):
            raise ProtocolError("piece does not fit into the file", got=f"{len(data)} bytes at {offset} of {size}")
        target.write(data)
        offset += len(data)
        if progress is not None:
            progress(len(data))
    return offset


def serve_piece(fields: Mapping[str, Any], source: BinaryIO, size: int) -> tuple[dict[str, Any], bytes]:
    """Return the reply to a request of `download`: the enclave's side.

    Raises:
        UsageError: no offset within the file.
    """
    offset = fields.get("offset")
    if type(offset) is not int or not 0 <= offset <= size:
        raise UsageError("not an offset within the file", expected=f"0 to {size}")
    source.seek(offset)
    return {"size": size}, source.read(min(MAX_PIECE_BYTES, size - offset))
