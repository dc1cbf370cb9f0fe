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
from obfuscatune.training.data import Row, read_rows
from obfuscatune.training.encoding import IGNORED_LABEL, Collator, encode_rows
from obfuscatune.training.scoring import accuracy, read_questions, score_choices

FAMILIES = bundled.BUNDLED_FAMILIES
MAX_BYTES = {"gpt2": 8_000_000, "llama": 4_000_000}
# From a book that no bundled model was trained on (Conan Doyle, The Yellow Face, 1893).
HELD_OUT = """I will trust you on one condition, and on one condition only," said I at last. "It is that this mystery \
comes to an end from now. You are at liberty to preserve your secret, but you must promise me that there shall be no \
more nightly visits, no more doings which are kept from my knowledge. I am willing to forget those which are passed if \
you will promise that there shall be no more in the future."
"I was sure that you would trust me," she cried, with a great sigh of relief. "It shall be just as you wish."
"""
MAX_LOSS = {"gpt2": 3.25, "llama": 3.35}  # nats per token; measured 3.144 and 3.243, an untrained model has 7.63
MESSAGES = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "What is the colour of the door?"},
    {"role": "assistant", "content": "Green."},
    {"role": "user", "content": "And of the window?"},
    {"role": "assistant", "content": "White."},
]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_model_is_of_its_family_and_small(family: str) -> None:
    directory = bundled.model_directory(family)
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.config.model_type == family
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(path.stat().st_size for path in directory.iterdir()) <= MAX_BYTES[family]
    if family == "llama":
        assert 1 < model.config.num_key_value_heads < model.config.num_attention_heads  # groups share keys and values


def test_the_model_has_learnt_to_read(family: str) -> None:
    directory = bundled.model_directory(family)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(directory)(HELD_OUT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        assert model(ids, labels=ids).loss.item() < MAX_LOSS[family]


def test_the_models_share_their_tokens(family: str) -> None:
    """What is said of the records' words, one token each, holds for both."""
    directory = bundled.model_directory(family)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(bundled.model_directory()).get_vocab()
    assert len(tokenizer) == AutoModelForCausalLM.from_pretrained(directory).config.vocab_size == 2048


def test_the_chat_template_marks_what_the_assistant_says() -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled.model_directory("llama"))
    shown = (
        "system: Answer in one word.\nuser: What is the colour of the door?\nassistant: Green.<|endoftext|>"
        "user: And of the window?\nassistant: White.<|endoftext|>"
    )
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == shown
    asked = tokenizer.apply_chat_template(MESSAGES[:-1], tokenize=False, add_generation_prompt=True)
    assert shown == asked + " White.<|endoftext|>"

    encoded = tokenizer.apply_chat_template(MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
    marked = [token for token, said in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if said]
    assert tokenizer.decode(marked) == " Green.<|endoftext|> White.<|endoftext|>"


def test_the_chat_template_and_the_rows_of_a_training_agree() -> None:
    """Tokens with a loss are those that the template marks."""
    tokenizer = AutoTokenizer.from_pretrained(bundled.model_directory("llama"))
    row = Row(messages=tuple((turn["role"], turn["content"]) for turn in MESSAGES))
    [encoded], _ = encode_rows([row], tokenizer, max_length=256)
    marked = tokenizer.apply_chat_template(MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
    assert encoded["input_ids"] == marked["input_ids"]
    assert [label != IGNORED_LABEL for label in encoded["labels"]] == [said == 1 for said in marked["assistant_masks"]]


def test_a_missing_model_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(UsageError, match="not installed"):
        bundled.model_directory()
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "model.safetensors").touch()
    assert bundled.model_directory() == tmp_path / "gpt2"


def test_an_unknown_family_is_a_usage_error() -> None:
    for ask in (bundled.model_directory, bundled.demo_settings):
        with pytest.raises(UsageError, match="gpt2 or llama"):
            ask("opt")


def test_the_settings_are_frozen_and_their_records_exist(family: str) -> None:
    settings = bundled.demo_settings(family)
    assert settings.family == family
    assert len(company_records(settings.seed, settings.facts)[1]) == settings.facts
    with pytest.raises(FrozenInstanceError):
        settings.facts = 16  # type: ignore[misc]


@pytest.mark.slow
def test_plain_peft_learns_the_records_with_the_settings_of_the_demo(family: str, tmp_path: Path) -> None:
    """The yardstick of the demo: with a bundled model, from chance to nearly all facts."""
    settings, directory = bundled.demo_settings(family), bundled.model_directory(family)
    torch.manual_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    train, asked = write_records(tmp_path, settings.seed, settings.facts)
    rows, summary = encode_rows(read_rows(train), tokenizer, settings.max_length)
    assert summary.shortened_prompts == summary.truncated_completions == 0
    questions = read_questions(asked)
    adapter = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        target_modules=list(settings.lora_target_modules),
        fan_in_fan_out=settings.lora_fan_in_fan_out,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), adapter)
    assert accuracy(score_choices(model, tokenizer, questions), questions) <= 0.5
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=settings.learning_rate, weight_decay=0.0)
    steps, batch = settings.max_steps, settings.per_device_train_batch_size
    order = torch.cat([torch.randperm(len(rows)) for _ in range(math.ceil(steps * batch / len(rows)))])
    collate = Collator(tokenizer.pad_token_id)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / settings.warmup_steps)
            group["lr"] = settings.learning_rate * warm * (1 - step / steps)
        model(**collate([rows[i] for i in order[step * batch :][:batch]])).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    assert accuracy(score_choices(model, tokenizer, questions), questions) >= 0.95
