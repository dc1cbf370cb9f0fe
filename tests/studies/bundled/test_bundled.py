import math
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import obfuscatune.studies.bundled as bundled
from obfuscatune.errors import UsageError
from obfuscatune.studies.bundled.records import company_records, write_records
from obfuscatune.training.data import Collator, encode_rows, read_rows
from obfuscatune.training.scoring import accuracy, read_questions, score_choices

SETTINGS = bundled.DemoSettings()


def test_a_missing_model_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(UsageError, match="not installed"):
        bundled.model_directory()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").touch()
    assert bundled.model_directory() == tmp_path / "model"


def test_the_settings_are_frozen_and_their_records_exist() -> None:
    assert len(company_records(SETTINGS.seed, SETTINGS.facts)[1]) == SETTINGS.facts
    with pytest.raises(FrozenInstanceError):
        SETTINGS.facts = 16  # type: ignore[misc]


@pytest.mark.slow
def test_plain_peft_learns_the_records_with_the_settings_of_the_demo(tmp_path: Path) -> None:
    """The yardstick of the demo: with the bundled model, from chance to nearly all facts."""
    directory = bundled.model_directory()
    torch.manual_seed(SETTINGS.seed)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    train, asked = write_records(tmp_path, SETTINGS.seed, SETTINGS.facts)
    rows, summary = encode_rows(read_rows(train), tokenizer, SETTINGS.max_length)
    assert summary.shortened_prompts == summary.truncated_completions == 0
    questions = read_questions(asked)
    adapter = LoraConfig(
        r=SETTINGS.lora_r,
        lora_alpha=SETTINGS.lora_alpha,
        target_modules=list(SETTINGS.lora_target_modules),
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), adapter)
    assert accuracy(score_choices(model, tokenizer, questions), questions) <= 0.5
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=SETTINGS.learning_rate, weight_decay=0.0)
    steps, batch = SETTINGS.max_steps, SETTINGS.per_device_train_batch_size
    order = torch.cat([torch.randperm(len(rows)) for _ in range(math.ceil(steps * batch / len(rows)))])
    collate = Collator(tokenizer.pad_token_id)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / SETTINGS.warmup_steps)
            group["lr"] = SETTINGS.learning_rate * warm * (1 - step / steps)
        model(**collate([rows[i] for i in order[step * batch :][:batch]])).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, SETTINGS.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    assert accuracy(score_choices(model, tokenizer, questions), questions) >= 0.95
