"""Where a run's numbers stop being numbers, there is no result: the first loss, gradient or factor that is not finite.

Nothing else stops such a run: the Trainer leaves a loss that is NaN out of its log, and goes on; and an adapter of NaNs
is written as any other. Nor does anything stop a model that is asked: of logits that are NaN, the first token is taken
for the likeliest.
"""

import math
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import LogitsProcessor

from obfuscatune.errors import NotFiniteError, TrainingError

_B = re.compile(r"\.lora_(embedding_)?B\b")
_HINT = "the run diverged: start it again with a lower learning rate, from the beginning or a checkpoint before this"


_AT_ONCE = "nothing was trained yet: look at the model's weights and configuration, its dtype, and lora_alpha"


def _hint(step: int) -> str:
    """No learning rate has made the numbers of a first step."""
    return _AT_ONCE if step == 1 else _HINT


def check_loss(loss: float, what: str, step: int) -> None:
    """Refuse a loss that is NaN or infinite.

    Raises:
        TrainingError: naming the step, counted from 1, and no number: a loss tells of the data.
    """
    if not math.isfinite(loss):
        raise TrainingError(f"the {what} is not finite", where=f"step {step}", hint=_hint(step))


def check_logits(logits: Tensor) -> None:
    """Refuse logits of which a position has NaN, infinity, or no finite number at all; -inf forbids a token.

    Raises:
        NotFiniteError: naming no number.
    """
    if logits.numel() and not logits.amax(dim=-1).isfinite().all():
        hint = "look at the weights, the adapter with its lora_alpha, and the dtype: the plain model's are not either"
        raise NotFiniteError("the logits of the model are not finite", hint=hint)


class FiniteScores(LogitsProcessor):
    """Changes nothing in a generation, and ends it as `check_logits` does."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores."""
        check_logits(scores)
        return scores


def check_gradients(parameters: Iterable[nn.Parameter], step: int) -> None:
    """Refuse gradients that are not finite, or whose norm has no room in their dtype: clipping makes zeros of them.

    Raises:
        TrainingError: as :func:`check_loss`.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients and not math.isfinite(torch.nn.utils.get_total_norm(gradients)):
        raise TrainingError("the norm of the gradient is not finite", where=f"step {step}", hint=_hint(step))


def check_adapter_file(path: Path) -> None:
    """Refuse an adapter of which a factor is not finite, or which is as LoRA begins; reads one tensor after the other.

    Raises:
        TrainingError: naming the factor; or that each B is zero, so that the adapter changes nothing.
    """
    trained, products = False, 0
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a map
            tensor: Tensor = file.get_tensor(name)
            if not tensor.isfinite().all():
                raise TrainingError("the adapter is not finite, and is not saved", got=name, hint=_HINT)
            if _B.search(name):
                products, trained = products + 1, trained or bool(tensor.any())
    if products and not trained:
        causes = "a learning rate of 0, a warm-up that is longer than the run, or rows with nothing to learn"
        hint = f"no step had an effect: {causes}"
        raise TrainingError("the adapter is as it began, and is not saved", got="zeros in each B", hint=hint)
