"""What ships with the package: small pre-trained models, private records to teach them, and the demo's settings."""

from dataclasses import dataclass
from pathlib import Path

from obfuscatune.errors import UsageError


@dataclass(frozen=True)
class DemoSettings:
    """Settings meant to lift a bundled model from chance to nearly every fact, on two cores in about a minute.

    Args:
        family: which bundled model, see `model_directory`.
        seed: of the records, of the adapter's start and of the order of the rows.
        facts: number of records, see `obfuscatune.studies.bundled.records.company_records`.
        lora_r: rank of the adapter.
        lora_alpha: scale of the adapter, times the rank.
        lora_target_modules: layers with an adapter, in the names of the family.
        lora_fan_in_fan_out: PEFT's word for weights stored as (in, out), which are GPT-2's alone.
        learning_rate: of AdamW without weight decay, falling linearly to zero after the warm-up.
        warmup_steps: steps of linear warm-up.
        max_steps: optimizer steps.
        per_device_train_batch_size: rows in a step.
        max_grad_norm: the gradient is clipped to this norm.
        max_length: tokens in a row.
    """

    family: str = "gpt2"
    seed: int = 0
    facts: int = 32
    lora_r: int = 16
    lora_alpha: int = 32
    lora_target_modules: tuple[str, ...] = ("c_attn", "c_proj", "c_fc")
    lora_fan_in_fan_out: bool = True
    learning_rate: float = 3e-3
    warmup_steps: int = 20
    max_steps: int = 300
    per_device_train_batch_size: int = 16
    max_grad_norm: float = 1.0
    max_length: int = 40


_SETTINGS = {
    "gpt2": DemoSettings(),
    "llama": DemoSettings(
        family="llama",
        lora_target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        lora_fan_in_fan_out=False,
        # At GPT-2's rate it learns as much, but two runs in the clear whose weights differ by 1e-7 part by 6e-3 in the
        # loss, at this one by 3e-6.
        learning_rate=1.5e-3,
    ),
}
BUNDLED_FAMILIES = tuple(_SETTINGS)


def demo_settings(family: str = "gpt2") -> DemoSettings:
    """Return the demo's settings for the bundled model of a family.

    Raises:
        UsageError: no model of this family is bundled.
    """
    if family not in _SETTINGS:
        raise UsageError("no model of this family is bundled", got=family, expected=" or ".join(BUNDLED_FAMILIES))
    return _SETTINGS[family]


def model_directory(family: str = "gpt2") -> Path:
    """Return the directory of the bundled model of a family, in the format of transformers.

    Raises:
        UsageError: no model of this family is bundled, or this installation came without it.
    """
    directory = Path(__file__).parent / demo_settings(family).family
    if not (directory / "model.safetensors").is_file():
        hint = "make one with tools/pretrain.py, or name a model with --model_name_or_path"
        raise UsageError("the bundled model is not installed", where=str(directory), hint=hint)
    return directory
