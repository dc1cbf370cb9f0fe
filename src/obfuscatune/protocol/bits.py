"""Attention masks on the wire: eight positions a byte."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from obfuscatune.errors import ProtocolError


def pack_mask(mask: Tensor) -> Tensor:
    """Return the bits of a bool mask ``[B, 1, T, S]`` as uint8 ``[ceil(n / 8)]``, first position in the lowest bit."""
    return torch.from_numpy(np.packbits(mask.numpy().reshape(-1), bitorder="little"))


def unpack_mask(bits: Tensor, shape: Any) -> Tensor:
    """Undo :func:`pack_mask`; raises ProtocolError where the shape does not fit the bits."""
    valid = isinstance(shape, list) and len(shape) == 4 and all(type(n) is int and 0 <= n < 2**31 for n in shape)
    count = int(np.prod(shape, dtype=object)) if valid else -1
    if not valid or bits.dtype != torch.uint8 or bits.ndim != 1 or bits.numel() != (count + 7) // 8:
        raise ProtocolError(
            "packed mask", got=f"{list(bits.shape)} for shape {shape!r}"[:80], expected="ceil(n/8) bytes"
        )
    if not bits.is_cpu:  # where they are: a copy to the host would wait for all that the device has to do
        each = bits.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=bits.device) & 1
        return each.view(-1)[:count].bool().view(shape)
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count, bitorder="little")).bool().view(shape)
