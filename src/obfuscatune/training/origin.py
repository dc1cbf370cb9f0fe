"""What a training run is made of, by name: a checkpoint states it, and a resumed run is compared with it.

A resumed run takes from its checkpoint the adapter, the optimizer with its rates, the schedule and the random numbers.
So another learning rate would have no effect, another rank does not fit, and another seed gives a run that is neither
of the two. Each is refused by name. Some may be changed on purpose, because they take effect from the next step on.
"""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from obfuscatune.errors import UsageError
from obfuscatune.settings import TrainingSettings
from obfuscatune.training.data import Row

# What is measured and kept on the way, which no result depends on.
_WITHOUT_EFFECT = ("logging_steps", "save_steps", "save_total_limit", "per_device_eval_batch_size")
# What takes effect where a run goes on: the stock Trainer reads it from its arguments, and not from the checkpoint.
CHANGEABLE = (
    *("data", "gradient_accumulation_steps", "lora_dropout", "max_grad_norm", "max_length", "max_steps"),
    *("num_train_epochs", "per_device_train_batch_size", "processes", "seed"),
)


def describe_run(
    settings: TrainingSettings, *, base: nn.Module, dtype: str, rows: Iterable[Row], processes: int = 1
) -> dict[str, Any]:
    """Return what a run is made of, as plain values by name.

    Args:
        base: the model without an adapter. Of its weights those count that are in memory: embeddings, norms, head.
        dtype: of the weights. rows: to learn from. processes: that train together.

    Secrecy: the digests tell whoever has a guess of the rows or the model whether it is right; a checkpoint is private.
    """
    described = {
        name: value for name, value in dataclasses.asdict(_plain(settings)).items() if name not in _WITHOUT_EFFECT
    }
    described["lora_target_modules"] = sorted(settings.targets()) or None
    described |= {"dtype": dtype, "model": _digest_model(base), "data": _digest_rows(rows), "processes": processes}
    found: dict[str, Any] = json.loads(json.dumps(described))  # as a file gives it back
    return found


def check_origin(made_with: Mapping[str, Any], run: Mapping[str, Any], allowed: Collection[str], where: str) -> None:
    """Refuse a checkpoint of a run that was made of something else.

    Args:
        made_with: of the checkpoint. run: that would go on. allowed: names of `CHANGEABLE` that may differ.

    Raises:
        UsageError: naming all that differs, with both values; or a name that cannot be allowed.
    """
    unknown = sorted(set(allowed) - set(CHANGEABLE))
    if unknown:
        expected = f"some of {', '.join(CHANGEABLE)}"
        hint = "all else comes out of the checkpoint, so that a change would have no effect, or does not fit"
        raise UsageError("cannot be changed in a resumed run", got=", ".join(unknown), expected=expected, hint=hint)
    names = sorted({*made_with, *run})
    differing = [name for name in names if made_with.get(name) != run.get(name) and name not in allowed]
    if not differing:
        return
    got, expected = (", ".join(f"{name}={_short(of.get(name))}" for name in differing) for of in (run, made_with))
    free = [name for name in differing if name in CHANGEABLE]
    if len(free) == len(differing):
        hint = f"go on with the same options, or on purpose with {' '.join(f'--allow_changed {name}' for name in free)}"
    else:
        fixed = ", ".join(name for name in differing if name not in CHANGEABLE)
        hint = f"go on with the same options; another {fixed} needs a new run"
    raise UsageError("the checkpoint is of another run", got=got, expected=expected, where=where, hint=hint)


def _plain(settings: TrainingSettings) -> TrainingSettings:
    """The settings alone, where the record has more options than these."""
    return TrainingSettings(**{f.name: getattr(settings, f.name) for f in dataclasses.fields(TrainingSettings)})


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def _digest_rows(rows: Iterable[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        parts = (row.prompt, row.completion, row.messages, row.context)
        digest.update(json.dumps(parts).encode() + b"\n")
    return digest.hexdigest()


def _digest_model(base: nn.Module) -> str:
    """Digest names and shapes of all parameters, and the values of those that are in memory."""
    digest = hashlib.sha256()
    for name, parameter in sorted(base.named_parameters()):
        digest.update(f"{name} {list(parameter.shape)}\n".encode())
        if parameter.is_contiguous():  # else it is not read yet, and a view of one number
            digest.update(parameter.detach().float().numpy().data)
    return digest.hexdigest()
