"""What the training settings mean to PEFT and to the Trainer."""

from typing import Any

from obfuscatune.errors import UsageError
from obfuscatune.settings import TrainingSettings

# Those that the Trainer's own arguments have under the same names.
_TRAINER_FIELDS = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "seed"),
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("num_train_epochs", "max_steps", "logging_steps", "save_steps", "save_total_limit"),
)


def add_adapter(base: Any, settings: TrainingSettings) -> Any:
    """Return the PEFT model around ``base``, its LoRA drawn from the settings' seed as plain PEFT draws it.

    Raises:
        UsageError: target modules that the model has not.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed
    from transformers.pytorch_utils import Conv1D

    from obfuscatune.enclave.families import layer_names

    known = layer_names(base)
    set_seed(settings.seed)
    adapter = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.targets() or known,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.modules()),
        task_type="CAUSAL_LM",
    )
    fault: ValueError | None = None
    missing = settings.targets() or known
    try:
        model: Any = get_peft_model(base, adapter)
        # PEFT passes over a name that no module has, if another one is found.
        found = model.base_model.targeted_module_names
        missing = [name for name in settings.targets() if not any(f".{path}".endswith(f".{name}") for path in found)]
    except ValueError as error:
        fault = error
    if missing:
        raise UsageError(
            "the adapter does not fit the model",
            got=", ".join(missing),
            where="lora_target_modules",
            hint=f"for this family: {', '.join(known)}",
        ) from fault
    return model


def training_arguments(settings: TrainingSettings, output_dir: str, **more: Any) -> Any:
    """Return the Trainer's own arguments; raises UsageError where it refuses them, or would at its first step."""
    from transformers import TrainingArguments

    try:
        found = TrainingArguments(
            output_dir=output_dir,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            prediction_loss_only=True,
            **{name: getattr(settings, name) for name in _TRAINER_FIELDS},
            # The enclave's part is on the CPU; what may run on an accelerator is the worker.
            **{"use_cpu": True, **more},
        )
    except ValueError as error:
        raise UsageError("training options", got=str(error).splitlines()[0]) from error
    _check_schedule(settings.lr_scheduler_type)
    return found


def _check_schedule(name: str) -> None:
    """Refuse a schedule that wants arguments of its own, which there is no setting for."""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    try:
        get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=2)
    except (ValueError, TypeError):
        hint = "linear, cosine, polynomial, constant, constant_with_warmup and inverse_sqrt need none"
        raise UsageError(
            "a schedule with arguments of its own", got=name, where="lr_scheduler_type", hint=hint
        ) from None
