"""What rows become is what TRL's SFTTrainer makes of them: the same tokens, and a loss on the same of them.

TRL's names: ``assistant_only_loss`` for messages, ``completion_only_loss`` for prompt and completion. Where we differ
on purpose, a test says how: docs/data.md has the reasons.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer, chat_template_utils

from obfuscatune.errors import DataError
from obfuscatune.studies.bundled import model_directory
from obfuscatune.training.data import read_rows
from obfuscatune.training.encoding import Collator, EncodingSummary, encode_rows
from obfuscatune.training.loading import load_config, load_tokenizer

SYSTEM, USER, USER_2 = (
    {"role": role, "content": content}
    for role, content in (("system", "Be short."), ("user", "Who was it?"), ("user", "And when?"))
)
ANSWER, ANSWER_2 = ({"role": "assistant", "content": c} for c in ("The king of the hill.", "Late in the year"))
CONVERSATIONS = [[USER, ANSWER], [USER, ANSWER, USER_2, ANSWER_2], [USER, ANSWER, USER_2]]
WITH_SYSTEM = [[SYSTEM, USER, ANSWER], [SYSTEM, USER, ANSWER, USER_2, ANSWER_2]]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURN = "{{ m.content }}<|im_end|>\n"
# The same text with marks: all of the assistant's turn, or all but the line end after its last token.
MARKED = CHATML.replace(
    TURN,
    f"{{% if m.role == 'assistant' %}}{{% generation %}}{TURN}{{% endgeneration %}}{{% else %}}{TURN}{{% endif %}}",
)
MARKED_TO_THE_END = MARKED.replace("\n{% endgeneration %}", "{% endgeneration %}\n")
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
INSTRUCTIONS = (  # a start token, an end token of the text after each answer, and no header of the answer
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %} {{ m.content }}<|im_end|>{% endgeneration %}{% else %}[INST] {{ m.content }} [/INST]{% endif %}"
    "{% endfor %}"
)
UNMARKED_INSTRUCTIONS = re.sub(r"{% (end)?generation %}", "", INSTRUCTIONS)

New = Callable[..., PreTrainedTokenizerBase]
Encoded = tuple[list[list[int]], list[list[int]], EncodingSummary]


@pytest.fixture(scope="module")
def new() -> New:
    """Make the bundled tokenizer with a chat template, and with its control tokens in the vocabulary."""

    def new(template: str | None = None, **more: str) -> PreTrainedTokenizerBase:
        tokenizer = load_tokenizer(str(model_directory()), load_config(str(model_directory())))
        names = sorted(set(re.findall(r"<\|?\w+\|?>", template or "")) - set(tokenizer.get_vocab()))
        tokenizer.add_tokens(names, special_tokens=True)
        tokenizer.chat_template = template
        for name, token in more.items():
            setattr(tokenizer, name, token)
        return tokenizer

    return new


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=8192, n_embd=8, n_layer=1, n_head=1, n_positions=64))


def ours(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, path: Path, length: int = 512) -> Encoded:
    """Ids and labels of the batch, and the summary."""
    file = path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    encoded, summary = encode_rows(read_rows(file), tokenizer, length)
    batch = Collator(tokenizer.pad_token_id)(encoded)
    return batch["input_ids"].tolist(), batch["labels"].tolist(), summary


def theirs(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, path: Path, model: Any, **options: Any
) -> tuple[list[list[int]], list[list[int]]]:
    """Ids and labels of the batch that TRL's trainer would train on."""
    arguments = SFTConfig(
        output_dir=str(path / "trl"),
        report_to="none",
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        disable_tqdm=True,
        **{"max_length": 512, **options},
    )
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])
    return batch["input_ids"].tolist(), batch["labels"].tolist()


def learnt(encoded: tuple[Any, ...], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text with a loss, of each row."""
    return [tokenizer.decode([label for label in row if label != -100]) for row in encoded[1]]


def without_padding(encoded: Encoded, row: int) -> list[int]:
    """The ids of a row up to its last token with a loss."""
    ids, labels = encoded[0][row], encoded[1][row]
    return ids[: max(i for i, label in enumerate(labels) if label != -100) + 1]


def messages(conversations: list[list[dict[str, str]]]) -> list[dict[str, Any]]:
    return [{"messages": turns} for turns in conversations]


TRL = vars(chat_template_utils)
ALL = CONVERSATIONS + WITH_SYSTEM
SAME = {
    # template of ours and of TRL's, conversations
    "marked": (MARKED, MARKED, ALL),
    "marked to the end of the turn": (MARKED_TO_THE_END, MARKED_TO_THE_END, ALL),
    "marked, a system turn of the template": (DEFAULT_SYSTEM + MARKED, DEFAULT_SYSTEM + MARKED, ALL),
    "no marks": (CHATML, MARKED, ALL),
    "no marks, a system turn of the template": (DEFAULT_SYSTEM + CHATML, DEFAULT_SYSTEM + MARKED, ALL),
    "instructions": (INSTRUCTIONS, INSTRUCTIONS, CONVERSATIONS),
    "instructions without marks": (UNMARKED_INSTRUCTIONS, INSTRUCTIONS, CONVERSATIONS),
    # Without marks: TRL then takes a marked template of its own.
    "llama 3": (TRL["llama3_chat_template"], TRL["llama3_chat_template"], ALL),
    "gemma": (TRL["gemma_chat_template"], TRL["gemma_chat_template"], CONVERSATIONS),
    "phi 3": (TRL["phi3_chat_template"], TRL["phi3_chat_template"], CONVERSATIONS[:2] + WITH_SYSTEM),
    "qwen 2.5, marked": (TRL["qwen2_5_training_chat_template"], TRL["qwen2_5_chat_template"], ALL),
}


@pytest.mark.parametrize("name", SAME)
def test_messages_become_what_they_become_in_trl(name: str, new: New, model: Any, tmp_path: Path) -> None:
    template, of_trl, conversations = SAME[name]
    rows = messages(conversations)
    mine = ours(rows, new(template), tmp_path)
    assert mine[:2] == theirs(rows, new(of_trl), tmp_path, model, assistant_only_loss=True)
    for turns, text in zip(conversations, learnt(mine, new(template)), strict=True):
        assert all((turn["content"] in text) == (turn["role"] == "assistant") for turn in turns)
    assert mine[2].answers_without_end == 0


def test_the_line_end_before_an_answer_is_no_part_of_it(new: New, model: Any, tmp_path: Path) -> None:
    """TRL's marks in Qwen 2.5 begin one token early: ours are where the template's own header of an answer ends."""
    tokenizer, rows = new(TRL["qwen2_5_chat_template"]), messages(CONVERSATIONS + WITH_SYSTEM)
    ids, labels, _ = ours(rows, tokenizer, tmp_path)
    their_ids, their_labels = theirs(rows, tokenizer, tmp_path, model, assistant_only_loss=True)
    assert ids == their_ids and labels != their_labels
    header = tokenizer("<|im_start|>assistant\n")["input_ids"]
    for row, label, other in zip(ids, labels, their_labels, strict=True):
        apart = [i for i in range(len(row)) if label[i] != other[i]]
        assert apart == [i for i in range(len(row)) if row[i + 1 - len(header) : i + 1] == header]
        assert all(label[i] == -100 for i in apart)


@pytest.mark.parametrize("template", [MARKED, CHATML, TRL["llama3_chat_template"]], ids=["marked", "no marks", "llama"])
@pytest.mark.parametrize("ends", ["of the vocabulary", "of the template"])
def test_prompts_and_completions_of_messages(template: str, ends: str, new: New, model: Any, tmp_path: Path) -> None:
    rows = [
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": [SYSTEM, USER, ANSWER, USER_2], "completion": [ANSWER_2]},
    ]
    more = {} if ends == "of the vocabulary" else {"eos_token": "<|eot_id|>" if "eot" in template else "<|im_end|>"}
    tokenizer = new(template, **more)
    mine = ours(rows, tokenizer, tmp_path)
    assert mine[:2] == theirs(rows, tokenizer, tmp_path, model, completion_only_loss=True)
    assert all(ANSWER["content"] not in text or i == 0 for i, text in enumerate(learnt(mine, tokenizer)))


def test_a_completion_of_several_turns_is_learnt_where_the_assistant_speaks(
    new: New, model: Any, tmp_path: Path
) -> None:
    """As TRL with both of its options; with ``completion_only_loss`` alone it learns the user's words too."""
    rows = [{"prompt": [SYSTEM, USER], "completion": [ANSWER, USER_2, ANSWER_2]}]
    for template in (MARKED, CHATML):
        mine = ours(rows, new(template), tmp_path)
        both = {"completion_only_loss": True, "assistant_only_loss": True}
        assert mine[:2] == theirs(rows, new(MARKED), tmp_path, model, **both)
        alone = theirs(rows, new(template), tmp_path, model, completion_only_loss=True)
        assert USER_2["content"] in learnt(alone, new(template))[0]
        assert USER_2["content"] not in learnt(mine, new(template))[0]


PLAIN = [
    {"prompt": "The king of the", "completion": " hill"},
    {"prompt": "Question: who?\nAnswer:", "completion": " It was the king.\n"},
    {"prompt": "one line\n", "completion": "another<|endoftext|>"},  # an end that is there is not doubled
]


@pytest.mark.parametrize("pad", ["<|endoftext|>", "<|im_end|>"])
def test_prompts_and_completions_of_text(pad: str, new: New, model: Any, tmp_path: Path) -> None:
    """Padding carries no loss; the end of a text does, even if it is the padding token too."""
    tokenizer = new(CHATML, pad_token=pad)
    mine = ours(PLAIN, tokenizer, tmp_path)
    assert mine[:2] == theirs(PLAIN, tokenizer, tmp_path, model, completion_only_loss=True)
    assert learnt(mine, tokenizer) == [
        " hill<|endoftext|>",
        " It was the king.\n<|endoftext|>",
        "another<|endoftext|>",
    ]
    assert any(row[-1] == tokenizer.pad_token_id and label[-1] == -100 for row, label in zip(*mine[:2], strict=True))


def test_text(new: New, model: Any, tmp_path: Path) -> None:
    rows = [{"text": "The king of the hill"}, {"text": "all of it, with its end<|endoftext|>"}]
    assert ours(rows, new(), tmp_path)[:2] == theirs(rows, new(), tmp_path, model)


def test_a_token_over_the_border_of_a_completion_is_not_learnt(new: New, model: Any, tmp_path: Path) -> None:
    """``generate`` never meets it: the prompt is tokenized alone. TRL warns, and trains on another context."""
    rows, tokenizer = [{"prompt": "the king ", "completion": "of hills"}], new()
    (ids,), (labels,), _ = ours(rows, tokenizer, tmp_path)
    (their_ids,), _ = theirs(rows, tokenizer, tmp_path, model, completion_only_loss=True)
    prompt = tokenizer("the king ")["input_ids"]
    assert ids[: len(prompt)] == prompt != their_ids[: len(prompt)]
    assert tokenizer.decode(ids) == tokenizer.decode(their_ids)
    assert labels == [-100] * len(prompt) + ids[len(prompt) :]


def test_an_answer_that_its_template_leaves_open_is_closed(new: New, model: Any, tmp_path: Path) -> None:
    """Without an end the model does not learn to stop, TRL warns of that. The end is on the last answer alone."""
    start, answer, end = "{% generation %}", " {{ m.content }}\n", "{% endgeneration %}"
    marked = (
        f"{{% for m in messages %}}{{{{ m.role }}}}:{{% if m.role == 'assistant' %}}{start}{answer}{end}"
        f"{{% else %}}{answer}{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}assistant:{{% endif %}}"
    )
    tokenizer, rows = new(marked.replace(start, "").replace(end, "")), messages([WITH_SYSTEM[1]])
    (ids,), (labels,), _ = ours(rows, tokenizer, tmp_path)
    (their_ids,), (their_labels,) = theirs(rows, new(marked), tmp_path, model, assistant_only_loss=True)
    assert ids == [*their_ids, tokenizer.eos_token_id] and labels == [*their_labels, tokenizer.eos_token_id]
    assert learnt(([], [labels]), tokenizer) == [" The king of the hill.\n Late in the year\n<|endoftext|>"]


def test_a_prompt_that_its_answer_changes_is_refused(new: New, model: Any, tmp_path: Path) -> None:
    """TRL lets the completion start where the two part, and warns."""
    rows = [{"prompt": [USER], "completion": [ANSWER]}]
    for template in (CHATML, MARKED):
        tokenizer = new(template.replace("\n{% endif %}", "\n<think>{% endif %}"))
        assert learnt(theirs(rows, tokenizer, tmp_path, model), tokenizer) == ["The king of the hill.<|im_end|>\n"]
        with pytest.raises(DataError, match="rewrites what is before an answer"):
            ours(rows, tokenizer, tmp_path)


def test_trl_refuses_templates_without_marks_that_it_does_not_know(new: New, model: Any, tmp_path: Path) -> None:
    rows = messages(CONVERSATIONS)
    with pytest.raises(ValueError, match="not training-compatible"):
        theirs(rows, new(CHATML), tmp_path, model, assistant_only_loss=True)
    assert learnt(ours(rows, new(CHATML), tmp_path), new(CHATML))[0] == "The king of the hill.<|im_end|>\n"


def test_marks_that_leave_out_the_end_are_followed_and_counted(new: New, model: Any, tmp_path: Path) -> None:
    template = MARKED.replace("<|im_end|>\n{% endgeneration %}", "{% endgeneration %}<|im_end|>\n")
    rows = messages(CONVERSATIONS[:2])
    mine = ours(rows, new(template), tmp_path)
    assert mine[:2] == theirs(rows, new(template), tmp_path, model, assistant_only_loss=True)
    assert mine[2].answers_without_end == 2


def test_a_row_that_is_too_long_keeps_its_completion(new: New, model: Any, tmp_path: Path) -> None:
    """TRL keeps the start, and drops a row that loses its completion by that; ours loses the left of its prompt."""
    rows, tokenizer, length = [PLAIN[1], {"prompt": "a b c d e f g h", "completion": " i"}, PLAIN[0]], new(), 5
    whole = ours(rows, tokenizer, tmp_path)
    ids, labels, summary = ours(rows, tokenizer, tmp_path, length)
    their_ids, _ = theirs(rows, tokenizer, tmp_path, model, completion_only_loss=True, max_length=length)
    assert their_ids == [whole[0][2][:length]]  # the completions of the others are beyond the cut
    assert (summary.shortened_prompts, summary.truncated_completions) == (3, 1)
    completion = [label for label in whole[1][0] if label != -100]
    assert ids[0] == labels[0] == completion[:length]
    assert ids[1] == without_padding(whole, 1)[-length:]
    assert learnt(([], labels[1:2]), tokenizer) == [" i<|endoftext|>"]


THINKING = "{% if loop.last and not add_generation_prompt %}<think>{% endif %}"  # in the last answer alone
SPACED = CHATML.replace("assistant\n", "assistant ").replace("}}\n{{", "}} {{")


@pytest.mark.parametrize(
    ("template", "conversation", "message"),
    [
        (CHATML.replace(TURN, THINKING + TURN), CONVERSATIONS[1], r"rewrites earlier turns .*jsonl:2, message 1\)"),
        (CHATML.replace("\n{% endif %}", "\n<think>{% endif %}"), CONVERSATIONS[0], "rewrites what is before an"),
        (SPACED, CONVERSATIONS[0], r"joins it with the answer.*rows\.jsonl:2, message 1\)"),
        (CHATML, [ANSWER, USER, ANSWER_2], r"the assistant speaks first.*rows\.jsonl:2"),
        (TRL["gemma_chat_template"], WITH_SYSTEM[0], r"messages with a TemplateError: got system, user.*jsonl:2"),
        (MARKED.replace("== 'assistant'", "== 'model'"), CONVERSATIONS[0], r"marks no token.*rows\.jsonl:2"),
    ],
    ids=["earlier turns", "the header", "one token", "no header", "a role", "no marks"],
)
def test_what_cannot_be_told_apart_is_refused(
    template: str, conversation: list[dict[str, str]], message: str, new: New, tmp_path: Path
) -> None:
    fine = [{"text": "fine"}, {"messages": conversation}]
    with pytest.raises(DataError, match=f"(?s){message}") as caught:
        ours(fine, new(template), tmp_path)
    assert caught.value.__context__ is None  # an error of the template may hold the turns
    assert not any(turn["content"].strip() in str(caught.value) for turn in conversation)


def test_labels_of_trl_are_those_that_the_model_is_trained_on(new: New, model: Any, tmp_path: Path) -> None:
    """The control: another loss is other labels."""
    rows, tokenizer = messages(CONVERSATIONS), new(MARKED)
    mine = ours(rows, tokenizer, tmp_path)
    everything = theirs(rows, tokenizer, tmp_path, model)
    assert mine[0] == everything[0] and mine[1] != everything[1]
    assert torch.tensor(everything[1]).ne(-100).sum() > torch.tensor(mine[1]).ne(-100).sum()
