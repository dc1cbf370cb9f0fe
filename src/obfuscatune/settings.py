"""How a model is fine-tuned: one record of settings, the same on the command line and in a job that two parties sign.

Names and defaults are those of ``transformers`` and PEFT where they have them.
"""

# ruff: noqa: RUF009 - _setting() makes a field, which is what the rule wants there

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from obfuscatune.errors import FormatError

_LARGEST = 3.4e38  # of float32
_MOST = 1 << 31  # of what is counted
_TRAINING = {"rich_help_panel": "Training"}
_LORA = {"rich_help_panel": "LoRA"}
_SAVING = {"rich_help_panel": "Logs and checkpoints"}


def _setting(text: str, default: Any, **more: Any) -> Any:
    """A field with its line of help and, for numbers, its least and greatest value; the command line reads both.

    A greatest value that is only there against nonsense is a ``ceiling``: no line of help shows it.
    """
    return field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings of one fine-tuning run. Values of the wrong type or out of range are refused by :meth:`from_dict`."""

    max_length: int = _setting("longest row in tokens", 512, min=2, ceiling=_MOST)

    learning_rate: float = _setting("peak learning rate", 2e-4, min=0, ceiling=_LARGEST, **_TRAINING)
    per_device_train_batch_size: int = _setting("rows of a batch", 8, min=1, ceiling=_MOST, **_TRAINING)
    per_device_eval_batch_size: int = _setting("rows of a batch in evaluation", 8, min=1, ceiling=_MOST, **_TRAINING)
    gradient_accumulation_steps: int = _setting("batches in one step", 1, min=1, ceiling=_MOST, **_TRAINING)
    num_train_epochs: float = _setting("passes over the data", 3.0, min=0, ceiling=1e6, **_TRAINING)
    max_steps: int = _setting("steps; above 0 it overrides num_train_epochs", -1, min=-1, ceiling=_MOST, **_TRAINING)
    warmup_steps: float = _setting(
        "steps of linear warm-up; below 1: a share of all steps", 0.0, min=0, ceiling=1e9, **_TRAINING
    )
    lr_scheduler_type: str = _setting("schedule after the warm-up", "linear", **_TRAINING)
    weight_decay: float = _setting("decoupled in AdamW", 0.0, min=0, ceiling=_LARGEST, **_TRAINING)
    max_grad_norm: float = _setting(
        "gradients are clipped to this norm; 0: not clipped", 1.0, min=0, ceiling=_LARGEST, **_TRAINING
    )
    optim: Literal["adamw", "sgd"] = _setting("optimizer", "adamw", **_TRAINING)
    seed: int = _setting(
        "for the adapter's start and the order of rows; keys are never seeded",
        42,
        min=0,
        ceiling=2**32 - 1,
        **_TRAINING,
    )

    lora_r: int = _setting("rank", 16, min=1, ceiling=4096, **_LORA)
    lora_alpha: int = _setting("alpha: the adapter is scaled by alpha / rank", 32, min=1, ceiling=_MOST, **_LORA)
    lora_dropout: float = _setting("dropout on the adapter's input", 0.0, min=0, max=0.99, **_LORA)
    lora_target_modules: list[str] | None = _setting(
        "layers, repeated or with commas; default: all linear layers of a block", None, **_LORA
    )

    logging_steps: int = _setting("steps between logs", 10, min=1, ceiling=_MOST, **_SAVING)
    save_steps: int = _setting("steps between checkpoints", 500, min=1, ceiling=_MOST, **_SAVING)
    save_total_limit: int | None = _setting("checkpoints to keep; default: all", None, min=1, ceiling=_MOST, **_SAVING)

    @classmethod
    def from_dict(cls, values: Any, what: str = "training settings") -> Self:
        """Return the settings of ``values``, a map; what is not in it has its default.

        Raises:
            FormatError: unknown names, wrong types or values out of range, all in one message.
        """
        if not isinstance(values, dict) or not all(type(name) is str for name in values):
            raise FormatError(f"{what} are not a map of names", got=type(values).__name__)
        hints = typing.get_type_hints(cls)
        fields = {f.name: f for f in dataclasses.fields(cls)}
        faults = [f"unknown {name[:40]!r}" for name in sorted(values) if name not in fields]
        given = {}
        for name in sorted(set(values) & set(fields)):
            value, metadata = values[name], fields[name].metadata
            if hints[name] is float and type(value) is int and abs(value) <= 1 << 53:
                value = float(value)
            fault = _fault(value, hints[name], metadata.get("min"), metadata.get("max", metadata.get("ceiling")))
            faults += [f"{name} is {fault}"] if fault else []
            given[name] = value
        if faults:
            raise FormatError(f"{what} do not fit", got="; ".join(faults))
        return cls(**given)

    def changed(self) -> dict[str, Any]:
        """Return the settings that are not their defaults, as plain values."""
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(TrainingSettings)
            if getattr(self, f.name) != f.default
        }

    def targets(self) -> list[str]:
        """Return the names in ``lora_target_modules``, split at commas and spaces."""
        return [name for names in self.lora_target_modules or () for name in names.replace(",", " ").split()]


def _fault(value: Any, hint: Any, least: float | None, greatest: float | None) -> str:
    """What is wrong with a value, or nothing."""
    if typing.get_origin(hint) is Literal:
        return "" if value in typing.get_args(hint) else f"not one of {', '.join(typing.get_args(hint))}"
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None:
        return "" if type(None) in kinds else "missing"
    if list[str] in kinds:
        fits = isinstance(value, list) and len(value) <= 64 and all(type(item) is str for item in value)
        return "" if fits else "not a list of names"
    if type(value) not in kinds:
        return f"of type {type(value).__name__}"
    if isinstance(value, float) and not math.isfinite(value):
        return "not finite"
    if least is not None and value < least:
        return f"below {least}"
    return f"above {greatest}" if greatest is not None and value > greatest else ""
