"""The device that a study is to run on, tried before anything is made or measured."""

import torch

from obfuscatune.errors import UsageError


def check_device(name: str) -> None:
    """Put a number there and take it back.

    Raises:
        UsageError: this machine has no such device.
    """
    try:
        torch.ones(1, device=name).cpu()  # a device without numbers, such as meta, is none
    except Exception:  # of many classes; that there is no driver is an AssertionError
        raise UsageError(
            "device not available", got=name, where="--device", hint="obfuscatune doctor lists devices"
        ) from None
