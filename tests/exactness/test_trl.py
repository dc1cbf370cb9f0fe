"""TRL's trainers on a protected model end at the adapter that they end at on the plain one."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, set_seed
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from obfuscatune.studies.bundled import model_directory
from obfuscatune.training.loading import load_config, load_tokenizer

from .models import worst

SAME = 1e-5  # float32, two steps of SGD; measured 6e-8
DIRECTORY = model_directory("llama")
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}a: {% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}u: {{ m.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)
SETTINGS: dict[str, Any] = {
    "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "optim": "sgd", "save_strategy": "no",
    "report_to": "none", "bf16": False, "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no",
}  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
Train = Callable[[Any, PreTrainedTokenizerBase, Path], Any]


def sentences(count: int) -> list[str]:
    words, drawing = ("the", "king", "of", "a", "hill", "was", "there", "and", "we", "know"), random.Random(0)
    return [" ".join(drawing.choice(words) for _ in range(5 + i % 7)) for i in range(count)]


def sft(rows: list[dict[str, Any]], **more: Any) -> Train:
    def make(model: Any, tokenizer: PreTrainedTokenizerBase, directory: Path) -> Any:
        arguments = SFTConfig(str(directory), max_length=32, **SETTINGS, **more)
        return SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)

    return make


def dpo(model: Any, tokenizer: PreTrainedTokenizerBase, directory: Path) -> Any:
    texts = sentences(24)
    rows = [
        {"prompt": a, "chosen": " " + b, "rejected": " " + c}
        for a, b, c in zip(texts[:8], texts[8:16], texts[16:], strict=True)
    ]
    arguments = DPOConfig(str(directory), max_length=40, **SETTINGS)
    return DPOTrainer(model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def grpo(model: Any, tokenizer: PreTrainedTokenizerBase, directory: Path) -> Any:
    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text))) for text in completions]

    arguments = GRPOConfig(str(directory), num_generations=2, max_completion_length=3, beta=0.1, **SETTINGS)
    rows = Dataset.from_list([{"prompt": text} for text in sentences(8)])
    return GRPOTrainer(model, reward, args=arguments, train_dataset=rows, processing_class=tokenizer)


TEXTS = [{"text": text} for text in sentences(24)]
CHATS = [
    {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
    for a, b in zip(sentences(16), reversed(sentences(16)), strict=True)
]
TRAINERS: dict[str, Train] = {
    "packed": sft(TEXTS, packing=True),
    "assistant only": sft(CHATS, assistant_only_loss=True),
    "dpo": dpo,
    "grpo": grpo,
}


def adapter_after(make: Train, model: Any, directory: Path) -> dict[str, Tensor]:
    tokenizer = load_tokenizer(str(DIRECTORY), load_config(str(DIRECTORY)))
    tokenizer.pad_token, tokenizer.chat_template = tokenizer.eos_token, TEMPLATE
    set_seed(3)
    make(model, tokenizer, directory).train()
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" in name}


def new_model() -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


@pytest.mark.parametrize(
    ("name", "profile"), [*((name, "balanced") for name in TRAINERS), ("packed", "stream"), ("dpo", "stream")]
)
def test_a_trainer_of_trl(protect: Any, tmp_path: Path, name: str, profile: str) -> None:
    plain, model = new_model(), new_model()
    before = {path: tensor.clone() for path, tensor in plain.state_dict().items() if "lora_" in path}
    expected = adapter_after(TRAINERS[name], plain, tmp_path)
    with protect(model, profile=profile) as protected:
        got = adapter_after(TRAINERS[name], protected.model, tmp_path)
    assert worst(got, expected) < SAME
    assert worst({path: expected[path] for path in before}, before) > 1e-3
