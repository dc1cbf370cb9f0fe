"""No private text in what is printed, whichever library raises it and in whichever call."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast, Trainer

CANARY = "zebra"
ROW = {"messages": [{"role": "user", "content": CANARY}, {"role": "assistant", "content": CANARY}]}


class PanicError(BaseException):
    """As a panic of Rust, which is no ``Exception``."""


@pytest.fixture
def commands(model_dir: Path, tmp_path: Path) -> dict[str, list[object]]:
    texts, chats, prompts = (tmp_path / f"{name}.jsonl" for name in ("texts", "chats", "prompts"))
    texts.write_text(json.dumps({"prompt": CANARY, "completion": CANARY}) + "\n")
    chats.write_text(json.dumps(ROW) + "\n")
    prompts.write_text(json.dumps({"prompt": CANARY}) + "\n")
    model = ["--model_name_or_path", model_dir, "--profile", "enclave"]
    trained = [*model, "--max_steps", 1, "--output_dir", tmp_path / "out"]
    return {
        "finetune": ["finetune", *trained, "--train_file", texts],
        "finetune chats": ["finetune", *trained, "--train_file", chats],
        "generate": ["generate", *model, "--prompt_file", prompts, "--max_new_tokens", 1],
        "generate --prompt": ["generate", *model, "--prompt", CANARY, "--max_new_tokens", 1],
        "generate chats": ["generate", *model, "--chat", "--prompt", CANARY, "--max_new_tokens", 1],
    }


@pytest.mark.parametrize("kind", [RuntimeError, PanicError])
@pytest.mark.parametrize(
    ("verb", "owner", "name"),
    [
        ("finetune", PreTrainedTokenizerFast, "_encode_plus"),
        ("finetune", GPT2LMHeadModel, "forward"),
        ("finetune", torch.Tensor, "backward"),
        ("finetune", Trainer, "_save_checkpoint"),
        ("finetune chats", PreTrainedTokenizerFast, "apply_chat_template"),
        ("generate", PreTrainedTokenizerFast, "_encode_plus"),
        ("generate", PreTrainedTokenizerFast, "pad"),
        ("generate", GPT2LMHeadModel, "generate"),
        ("generate --prompt", PreTrainedTokenizerFast, "decode"),
        ("generate chats", PreTrainedTokenizerFast, "apply_chat_template"),
    ],
)
def test_an_error_of_another_library_is_told_without_its_words(
    verb: str, owner: type, name: str, kind: type[BaseException], commands, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **named: Any) -> None:
        try:
            raise ValueError(CANARY)  # a chain of two, as libraries make them
        except ValueError as error:
            raise kind(f"cannot take {CANARY!r}") from error

    monkeypatch.setattr(owner, name, fail)
    if "chats" in verb:
        monkeypatch.setattr("obfuscatune.training.chat._template", lambda tokenizer, where: "no marks")
    outcome = run(*commands[verb])
    assert outcome.code in (1, 2) and kind.__name__ in outcome.err, outcome.err
    assert CANARY not in outcome.err + outcome.out and "Traceback" not in outcome.err


def test_the_control_prints_what_it_was_asked_for(commands, run) -> None:
    outcome = run(*commands["generate"])
    assert outcome.code == 0 and CANARY not in outcome.err
