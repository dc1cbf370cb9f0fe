"""Completions are those of the stock ``generate``: where they stop, what a chat prompt is, what pads a batch."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel, Mamba2Config, PreTrainedTokenizerFast

from obfuscatune.errors import DataError, UsageError
from obfuscatune.serving.prompts import Prompts
from obfuscatune.training.completion import complete, prompt_ids, stop_tokens
from obfuscatune.training.data import Row
from obfuscatune.training.encoding import encode_rows, positions_of

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('zebra') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT = (("user", "a"), ("assistant", "b"), ("user", "c"))
NewTokenizer = Callable[..., PreTrainedTokenizerFast]


@pytest.fixture
def model() -> Any:
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=258, n_embd=16, n_layer=1, n_head=2, n_positions=64, eos_token_id=256)
    config.initializer_range = 0.5  # so that greedy tokens differ
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def chat(new_tokenizer: NewTokenizer) -> PreTrainedTokenizerFast:
    tokenizer = new_tokenizer(bos=True)
    tokenizer.chat_template = TEMPLATE
    tokenizer.padding_side = "left"
    return tokenizer


def stock(model: Any, tokenizer: Any, text: str) -> list[int]:
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    output = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return output[0, ids.shape[1] :].tolist()


def test_a_chat_prompt_is_the_template_up_to_the_answer_with_one_start(model: Any, chat: Any) -> None:
    texts = ["<start>[user]a[assistant]b[user]c[assistant]", "<start>plain"]
    assert [chat.decode(ids) for ids in prompt_ids(model.config, chat, [("1", CHAT), ("2", "plain")], 5)] == texts
    batch = complete(model, chat, [("1", CHAT), ("2", "plain")], max_new_tokens=12, do_sample=False)
    assert batch == [chat.decode(stock(model, chat, text), skip_special_tokens=True) for text in texts]
    assert batch[0] != batch[1]


def test_a_prompt_begins_as_a_row_of_training_and_does_not_end(model: Any, new_tokenizer: NewTokenizer) -> None:
    """As with add_eos_token, and with tokenizers that begin otherwise than with one start token (GLM)."""
    tokenizer = new_tokenizer()
    for around, start in (("$A <end>", []), ("<start> $A <end>", [257]), ("<end> <start> $A", [256, 257])):
        marks = [("<end>", 256), ("<start>", 257)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=around, special_tokens=marks)
        (prompt,) = prompt_ids(model.config, tokenizer, [("1", "plain")], 5)
        (row,), _ = encode_rows([Row("plain", " text")], tokenizer, 64)
        assert prompt == start + tokenizer("plain", add_special_tokens=False)["input_ids"]
        assert row["labels"][: len(prompt) + 1] == [-100] * len(prompt) + [row["input_ids"][len(prompt)]]
        assert row["input_ids"][: len(prompt)] == prompt == Prompts(tokenizer).text("plain")
        (short,), _ = encode_rows([Row("plain", " text")], tokenizer, len(start) + 7)
        assert tokenizer.decode(short["input_ids"][len(start) :]) == "n text<end>"
        assert short["input_ids"][: len(start)] == start


def test_what_the_model_s_own_settings_ask_to_be_returned_changes_nothing(model: Any, chat: Any) -> None:
    expected = complete(model, chat, [("1", "plain")], max_new_tokens=5, do_sample=False)
    own = model.generation_config
    own.return_dict_in_generate, own.output_scores, own.num_return_sequences, own.num_beams = True, True, 2, 2
    assert complete(model, chat, [("1", "plain")], max_new_tokens=5, do_sample=False, num_beams=1) == expected
    assert len(complete(model, chat, [("1", "plain"), ("2", "plain")], max_new_tokens=5)) == 2


def test_a_completion_stops_at_each_of_the_model_s_ends(model: Any, chat: Any) -> None:
    free = stock(model, chat, "<start>plain")
    stop = next(token for i, token in enumerate(free) if i > 1 and token not in free[:i])
    model.generation_config.eos_token_id = [256, stop]
    ended = stock(model, chat, "<start>plain")
    assert ended == free[: len(ended)] and ended[-1] == stop and len(ended) < len(free)
    (text,) = complete(model, chat, [("1", "plain")], max_new_tokens=12, do_sample=False)
    assert text == chat.decode(ended, skip_special_tokens=True)
    # Fine-tuning closes rows with the tokenizer's end, whatever the model's own settings are.
    model.generation_config.eos_token_id = None
    chat.eos_token = chat.convert_ids_to_tokens(stop)
    assert complete(model, chat, [("1", "plain")], max_new_tokens=12, do_sample=False) != [chat.decode(free)]
    assert stop_tokens(model, chat) == [stop]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ((("system", "zebra"), ("user", "zebra")), "refuses the messages with a TemplateError: got system, user"),
        ((("user", "zebra" * 9),), "too long for the model: got 63 tokens and 12 new ones, expected at most 64"),
        ("zebra" * 11, "too long for the model: got 56 tokens and 12 new ones"),
    ],
)
def test_a_bad_prompt_is_refused_by_name(prompt: Any, message: str, model: Any, chat: Any) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        prompt_ids(model.config, chat, [("file:1", "fine"), ("file:2", prompt)], 12)
    assert caught.value.where == "file:2" and "zebra" not in str(caught.value)


def test_messages_without_a_template_are_refused(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UsageError, match="no chat template") as caught:
        prompt_ids(model.config, tokenizer, [("file:2", CHAT)], 5)
    assert not isinstance(caught.value, DataError)


def test_a_token_that_the_model_has_no_embedding_of_is_refused(model: Any, new_tokenizer: NewTokenizer) -> None:
    tokenizer = new_tokenizer()
    tokenizer.add_tokens(["<picture>"], special_tokens=True)
    for prompt in ("zebra <picture>", (("user", "zebra <picture>"),)):
        tokenizer.chat_template = TEMPLATE
        with pytest.raises(
            DataError, match=r"no embedding of: got token 258, expected below 258 \(at file:2\)"
        ) as caught:
            prompt_ids(model.config, tokenizer, [("file:1", "fine"), ("file:2", prompt)], 5)
        assert "zebra" not in str(caught.value)


def test_a_model_that_says_no_number_of_positions_has_no_bound() -> None:
    configs = GPT2Config(n_positions=7), Mamba2Config(), SimpleNamespace(max_position_embeddings=None)
    assert [positions_of(config) for config in configs] == [7, None, None]
