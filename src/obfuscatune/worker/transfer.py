"""Copies between the memory of a worker's machine and its device.

Where that is a GPU, tensors of frames lie in page-locked memory, from which the GPU copies by itself while this process
goes on; torch keeps such memory until the copy is done. What goes back is copied all at once, and waited for once.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def pins(device: torch.device) -> bool:
    """Whether tensors on their way to a device, or from it, lie in page-locked memory."""
    return device.type == "cuda"


def to_device(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return tensors on the device; the host may still read those given, and must not change them meanwhile."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}


def to_host(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return tensors in the host's memory, complete: the host is told of a copy that is under way by nothing else."""
    if not pins(device):
        return dict(tensors)
    here = {name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        here[name].copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(device).synchronize()
    return here
