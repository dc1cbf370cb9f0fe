"""A recording as frames: who sent what when, decoded from the bytes that crossed and nothing else."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from obfuscatune.protocol.expand import tensors_drawn
from obfuscatune.protocol.frames import PREFIX, decode_frame, decode_prefix
from obfuscatune.protocol.limits import Limits
from obfuscatune.studies.audit.recorder import TO_WORKER, read_records


@dataclass(frozen=True, slots=True, repr=False)
class Frame:
    """One request or reply.

    Attributes:
        request: whether it went to the worker. seconds: of its first byte, since the session's start. size: in bytes.
    """

    request: bool
    seconds: float
    size: int
    header: dict[str, Any]
    tensors: dict[str, Tensor]


def read_frames(path: Path) -> Iterator[Frame]:
    """Yield the frames of a recording in the order in which they ended."""
    buffers: dict[int, bytearray] = {}
    begun: dict[int, float] = {}
    for direction, seconds, run in read_records(path):
        buffer = buffers.setdefault(direction, bytearray())
        if not buffer:
            begun[direction] = seconds
        buffer += run
        if len(buffer) >= PREFIX.size:
            end = PREFIX.size + sum(decode_prefix(bytes(buffer[: PREFIX.size])))
            if len(buffer) >= end:
                header, tensors = decode_frame(memoryview(bytes(buffer[:end])))
                decoded = {name: _tensor(*entry) for name, entry in tensors.items()}
                if "drawn" in header:  # what the worker makes of a seed, it has
                    decoded |= tensors_drawn(header["drawn"], Limits().max_payload_bytes)
                yield Frame(direction == TO_WORKER, begun[direction], end, header, decoded)
                del buffer[:end]


def _tensor(spec: Any, elements: memoryview) -> Tensor:
    if not elements:
        return torch.empty(spec.shape, dtype=spec.dtype)
    return torch.frombuffer(bytearray(elements), dtype=spec.dtype).view(spec.shape)
