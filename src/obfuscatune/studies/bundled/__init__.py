"""What ships with the package: a small pre-trained model, private records to teach it, and the settings of the demo."""

from dataclasses import dataclass
from pathlib import Path

from obfuscatune.errors import UsageError


@dataclass(frozen=True)
class DemoSettings:
    """Settings meant to lift the bundled model from chance to nearly every fact, on two cores in about a minute.

    Args:
        seed: of the records, of the adapter's start and of the order of the rows.
        facts: number of records, see `obfuscatune.studies.bundled.records.company_records`.
        lora_r: rank of the adapter.
        lora_alpha: scale of the adapter, times the rank.
        lora_target_modules: layers with an adapter, in the names of GPT-2.
        learning_rate: of AdamW without weight decay, falling linearly to zero after the warm-up.
        warmup_steps: steps of linear warm-up.
        max_steps: optimizer steps.
        per_device_train_batch_size: rows in a step.
        max_grad_norm: the gradient is clipped to this norm.
        max_length: tokens in a row.
    """

    seed: int = 0
    facts: int = 32
    lora_r: int = 16
    lora_alpha: int = 32
    lora_target_modules: tuple[str, ...] = ("c_attn", "c_proj", "c_fc")
    learning_rate: float = 3e-3
    warmup_steps: int = 20
    max_steps: int = 300
    per_device_train_batch_size: int = 16
    max_grad_norm: float = 1.0
    max_length: int = 40


def model_directory() -> Path:
    """Return the directory of the bundled model, in the format of transformers.

    Raises:
        UsageError: this installation came without it.
    """
    directory = Path(__file__).parent / "model"
    if not (directory / "model.safetensors").is_file():
        hint = "make one with tools/pretrain.py, or name a model with --model_name_or_path"
        raise UsageError("the bundled model is not installed", where=str(directory), hint=hint)
    return directory
