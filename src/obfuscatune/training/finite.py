"""Where a run's numbers stop being numbers, there is no result: the first loss, gradient or factor that is not finite.

Nothing else stops such a run: the Trainer leaves a loss that is NaN out of its log, and goes on; and an adapter of NaNs
is written as any other.
"""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from obfuscatune.errors import TrainingError

_HINT = "the run diverged: start it again with a lower learning rate, from the beginning or a checkpoint before this"


def check_loss(loss: float, what: str, step: int) -> None:
    """Refuse a loss that is NaN or infinite.

    Raises:
        TrainingError: naming the step, counted from 1, and no number: a loss tells of the data.
    """
    if not math.isfinite(loss):
        raise TrainingError(f"the {what} is not finite", where=f"step {step}", hint=_HINT)


def check_gradients(parameters: Iterable[nn.Parameter], step: int) -> None:
    """Refuse gradients that are not finite, or whose norm has no room in their dtype: clipping makes zeros of them.

    Raises:
        TrainingError: as :func:`check_loss`.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients and not math.isfinite(torch.nn.utils.get_total_norm(gradients)):
        raise TrainingError("the norm of the gradient is not finite", where=f"step {step}", hint=_HINT)


def check_adapter_file(path: Path) -> None:
    """Refuse an adapter of which a factor is not finite; reads one tensor after the other.

    Raises:
        TrainingError: naming the factor.
    """
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a map
            tensor: Tensor = file.get_tensor(name)
            if not tensor.isfinite().all():
                raise TrainingError("the adapter is not finite, and is not saved", got=name, hint=_HINT)
