"""Two halves of a batch under way: while the worker computes one, the enclave does the other's norms, keys and LoRA.

A training step is a chain of calls: the enclave waits for the worker and for the link, and the worker for the enclave.
Two halves of the batch are two chains that do not depend on each other. Each runs in a thread of its own, with the
stock model and the stock loss; the session sends what either has ready and hands each its replies. The gradients are
added in a fixed order, half by half, so that a step is the same every time.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from obfuscatune.errors import UsageError, WorkerFault
from obfuscatune.profiles import Profile


def check_overlap(model: nn.Module, profile: Profile) -> None:
    """Refuse what two halves at once would change.

    Raises:
        UsageError: LoRA factors on the worker, whose gradients add up there in the order of arrival; or dropout, whose
            random numbers two threads would draw in no fixed order.
    """
    if profile.lora_placement == "worker":
        hint = "lora_placement=enclave, or a profile that has it: balanced, strict, stream"
        raise UsageError("overlap does not fit LoRA factors on the worker", got=f"profile {profile.name}", hint=hint)
    dropout = max(map(_dropout, model.modules()))
    if dropout > 0:
        raise UsageError("overlap does not fit dropout", got=dropout, expected=0.0, hint="leave overlap out")


def check_settings(args: Any, compute_loss_func: Any) -> None:
    """Refuse settings of the Trainer with which two halves would not add up to the batch.

    Raises:
        UsageError: a loss other than the model's own; or noise, which two threads would draw in no fixed order.
    """
    settings = {name: getattr(args, name) for name in ("label_smoothing_factor", "neftune_noise_alpha")}
    if compute_loss_func is not None:
        settings["compute_loss_func"] = "a function"
    for name, value in settings.items():
        if value:
            raise UsageError(f"overlap does not fit {name}", got=value, hint="leave overlap out")


def _dropout(module: nn.Module) -> float:
    """Probability of a dropout layer, or of the one in an attention's own arithmetic."""
    found = module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0.0)
    return float(found) if isinstance(found, int | float) else 0.0


def token_shape(inputs: Mapping[str, Any]) -> torch.Size | None:
    """Return rows and length of a batch, of ids or of embeddings; None where it has neither."""
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(value := inputs.get(name), Tensor):
            return value.shape[:2]
    return None


def halves_of(inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Split every tensor of a batch along its rows into two halves; one batch of a single row stays whole."""
    shape = token_shape(inputs)
    if shape is None or shape[0] < 2:
        return [dict(inputs)]
    rows = shape[0]
    return [_part(inputs, slice(0, (rows + 1) // 2), rows), _part(inputs, slice((rows + 1) // 2, rows), rows)]


def _part(inputs: Mapping[str, Any], part: slice, rows: int) -> dict[str, Any]:
    """Some rows of a batch; and of each map in it, as masks may be, for each kind of attention."""
    found = {}
    for name, value in inputs.items():
        if isinstance(value, Mapping):
            found[name] = _part(value, part, rows)
        else:
            found[name] = value[part] if _has_rows(value, rows) else value
    return found


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows


def step(
    loss_of: Callable[[dict[str, Any]], Tensor], inputs: Mapping[str, Any], parameters: Sequence[nn.Parameter]
) -> Tensor:
    """Add the gradients of a batch's loss to ``parameters``, and return the loss, detached.

    Args:
        loss_of: the loss of a part of the batch, such that the losses of parts add up to the batch's.
        parameters: all that is trained.

    Raises: what ``loss_of`` raises in either half; where both do, a WorkerFault before any other error, else the first
        half's. An interrupt is raised at once, and the other half ends by itself: with the session that it waits for.
    """
    halves = halves_of(inputs)
    results: list[tuple[Tensor, tuple[Tensor | None, ...]] | BaseException] = [RuntimeError("not run")] * len(halves)

    threads = torch.get_num_threads()

    def run(number: int) -> None:
        torch.set_num_threads(threads)  # a new thread takes over what any thread has set last: 1, for small work
        try:
            loss = loss_of(halves[number])
            results[number] = loss.detach(), torch.autograd.grad(loss, parameters, allow_unused=True)
        except BaseException as error:  # raised again in the caller's thread
            results[number] = error
            if number == 0 and not isinstance(error, Exception):
                raise  # Ctrl-C again, or SIGTERM's time is over: the other half may wait for a silent worker for long

    # A new thread has torch's defaults: gradients on, no autocast. `loss_of` brings its contexts along.
    # It is a daemon, so that the process ends though it waits.
    other = threading.Thread(target=run, args=(1,), daemon=True) if len(halves) > 1 else None
    if other is not None:
        other.start()
    run(0)
    if other is not None:
        other.join()
    # The other half finds the session ended, which tells of no cause. The order of sums stays.
    results.sort(key=lambda result: not isinstance(result, WorkerFault))
    total: Tensor | None = None
    for result in results:
        if isinstance(result, BaseException):
            raise result
        loss, gradients = result
        total = loss if total is None else total + loss
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    if total is None:
        raise RuntimeError("a batch without rows")
    return total
