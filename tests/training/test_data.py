import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.normalizers import NFKC
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, Trainer, TrainingArguments

from obfuscatune.errors import DataError, UsageError
from obfuscatune.training.chat import prompt_tokens, spells_special
from obfuscatune.training.data import Row, completed_row, read_prompts, read_rows
from obfuscatune.training.encoding import Collator, encode_rows
from obfuscatune.training.jsonl import MAX_LINE_BYTES

CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<stop>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SECRET = "zebra"
NewTokenizer = Callable[..., PreTrainedTokenizerFast]


def encode_one(row: Row, tokenizer: PreTrainedTokenizerFast, max_length: int = 100) -> tuple[str, str]:
    """The text of the row and the text of what is learnt of it."""
    (encoded,), _ = encode_rows([row], tokenizer, max_length)
    learnt = [token for token in encoded["labels"] if token != -100]
    pairs = zip(encoded["input_ids"], encoded["labels"], strict=True)
    assert all(label in (-100, token) for token, label in pairs)
    return tokenizer.decode(encoded["input_ids"]), tokenizer.decode(learnt)


def write(tmp_path: Path, *rows: object) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_formats_are_read(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    conversational = {"prompt": turns[:1], "completion": turns[1:]}
    plain = {"prompt": "p", "completion": " c"}
    path = write(tmp_path, {"text": "t", "id": 7}, plain, {"messages": turns}, conversational)
    assert read_rows(path) == [
        Row(completion="t", where=f"{path}:1"),
        Row(prompt="p", completion=" c", where=f"{path}:2"),
        Row(messages=(("user", "a"), ("assistant", "b")), where=f"{path}:3"),
        Row(messages=(("user", "a"), ("assistant", "b")), where=f"{path}:4", context=1),
    ]


def test_prompts_are_read_and_completed_rows_are_training_rows(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    rows = [{"prompt": "p", "completion": " c"}, {"prompt": turns[:1]}, {"messages": turns, "id": 1}]
    path = write(tmp_path, *rows)
    prompts = read_prompts(path)
    asked = (("user", "a"), ("assistant", "b"), ("user", "c"))
    assert prompts == [(f"{path}:1", "p"), (f"{path}:2", asked[:1]), (f"{path}:3", asked)]
    completed = write(tmp_path, *(completed_row(prompt, " d") for _, prompt in prompts))
    assert read_rows(completed) == [
        Row("p", " d", where=f"{completed}:1"),
        Row(messages=(*asked[:1], ("assistant", " d")), where=f"{completed}:2", context=1),
        Row(messages=(*asked, ("assistant", " d")), where=f"{completed}:3", context=3),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "zebra"}, "wrong keys: got no 'prompt'; unknown key 'text'"),
        ({"prompt": []}, "'prompt' is empty"),
        ({"prompt": 7}, "'prompt' has the wrong type: got int"),
        ({"messages": "zebra"}, "'messages' has the wrong type"),
        ({"messages": [{"role": "user", "content": "zebra"}], "prompt": "zebra"}, "unknown key 'prompt'"),
        ({"messages": [{"role": "assistant", "content": "zebra"}]}, "nothing to answer"),
    ],
)
def test_a_bad_prompt_is_refused_with_its_line_and_without_its_content(
    row: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path, {"prompt": "fine"}, row)
    with pytest.raises(DataError) as caught:
        read_prompts(path)
    assert message in str(caught.value) and f"{path}:2" in str(caught.value) and SECRET not in str(caught.value)


def test_blank_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\n{"text": "t"}\r\n\n{"text": 1}')
    with pytest.raises(DataError, match=r"data\.jsonl:4"):
        read_rows(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "zebra \xff"}', "not UTF-8: got a bad byte at column 17"),
        (b'{"text": "zebra"', "not JSON: got a syntax error at column 17"),
        (b'{"text": "zebra \\z"}', "not JSON"),
        (b"[" * 100_000, "not JSON: got a RecursionError"),
        (b'{"meta": ' + b"9" * 5000 + b"}", "not JSON: got a ValueError"),
        (b'{"text": "zebra", "text": "fine"}', "not JSON: got a key twice in one object"),
        (b'{"messages": [{"role": "user", "role": "zebra"}]}', "not JSON: got a key twice"),
        (b'{"text": "zebra", "id": NaN}', "not JSON: got NaN"),
        (b'["zebra"]', "not an object: got list, expected a JSON object"),
        (b'{"id": "zebra"}', "in no known format: got key 'id', expected text, prompt"),
        (b'{"id": 1, "zebra": 2}', "got key 'id', key 2 of 2 (name not shown), expected"),
        (
            b'{"text": "a", "zebra": 2, "meta": {}}',
            "wrong keys: got unknown key 2 of 3 (name not shown), expected text",
        ),
        (
            b'{"messages": [{"role": "user", "content": "a", "zebra": 1, "label": 2}]}',
            "got unknown key 'label', key 3 of 4 (name not shown), expected content + role",
        ),
        (("{" + ", ".join(f'"zebra{n}": 1' for n in range(100)) + "}").encode(), "(name not shown) and 92 more,"),
        (b"{}", "in no known format: got no keys"),
        (b'{"text": "zebra", "prompt": "zebra", "completion": "zebra"}', "in several formats"),
        (b'{"prompt": "zebra"}', "wrong keys: got no 'completion'"),
        (b'{"text": "zebra", "label": "zebra"}', "wrong keys: got unknown key 'label'"),
        (b'{"text": ["zebra"]}', "'text' has the wrong type: got list, expected a string"),
        (b'{"prompt": "zebra", "completion": " "}', "'completion' is empty"),
        (b'{"text": "zebra \\ud800"}', "half a surrogate pair"),
        (b'{"messages": "zebra"}', "'messages' has the wrong type"),
        (b'{"messages": ["zebra"]}', "'messages' has the wrong type"),
        (b'{"messages": []}', "'messages' is empty"),
        (b'{"prompt": [{"role": "user", "content": "zebra"}], "completion": "zebra"}', "'prompt' has the wrong type"),
        (b'{"prompt": [], "completion": [{"role": "assistant", "content": "zebra"}]}', "'prompt' is empty"),
        (
            b'{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "user", "content": "zebra"}]}',
            "nothing to learn from",
        ),
        (b'{"messages": [{"role": "user", "content": "zebra"}]}', "nothing to learn from"),
        (b'{"messages": [{"role": "zebra", "content": "zebra"}]}', "unknown role: expected system, user, assistant"),
        (b'{"messages": [{"role": ["zebra"], "content": "zebra"}]}', "unknown role"),
        (b'{"messages": [{"role": "assistant"}]}', "message 0"),
        (b'{"text": "' + b"zebra" * (MAX_LINE_BYTES // 5) + b'"}', "too long: expected at most 1,000,000 bytes"),
    ],
)
def test_a_bad_row_is_refused_with_its_line_and_without_its_content(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert message in str(caught.value)
    assert f"{path}:2" in str(caught.value)
    error: BaseException | None = caught.value
    while error is not None:  # a decoder's exception in the chain would carry the line
        assert SECRET not in str(vars(error)) + str(error.args) + str(getattr(error, "doc", ""))
        error = error.__context__


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="no rows"):
        read_rows(path)


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file") as caught:
        read_rows(tmp_path / "none.jsonl")
    assert not isinstance(caught.value, DataError)


def test_the_texts_of_a_row_are_not_in_its_repr() -> None:
    assert SECRET not in repr(Row(SECRET, SECRET, (("user", SECRET),), "file:1"))


def test_the_loss_is_on_the_completion_and_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    assert encode_one(Row("ask", " tell"), tokenizer) == ("ask tell<end>", " tell<end>")
    assert encode_one(Row(completion="all of it"), tokenizer) == ("all of it<end>", "all of it<end>")


def sentences(normalizer: object, pre_tokenizer: object, decoder: object) -> PreTrainedTokenizerFast:
    """A tokenizer that marks words by the space before them, as SentencePiece's do."""
    tokens = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    if normalizer is not None:
        tokens.normalizer = normalizer
    if pre_tokenizer is not None:
        tokens.pre_tokenizer = pre_tokenizer
    tokens.decoder = decoder
    trainer = trainers.BpeTrainer(vocab_size=70, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokens.train_from_iterator(["the answer is yes and no\n", "question: is it? yes\n", "hello world\n"] * 20, trainer)
    tokens.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def metaspace(scheme: str) -> PreTrainedTokenizerFast:
    spaces = (pre_tokenizers.Metaspace(prepend_scheme=scheme), decoders.Metaspace(prepend_scheme=scheme))
    return sentences(None, *spaces)


def prepended() -> PreTrainedTokenizerFast:
    """As Llama 2's files have it."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return sentences(normalizer, None, decoder)


@pytest.mark.parametrize("make", [lambda: metaspace("always"), lambda: metaspace("first"), prepended])
def test_a_completion_gets_no_space_that_is_not_in_the_row(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer = make()
    pairs = [
        ("question: is it? ", "yes"),
        ("question: is it?", " yes"),
        ("hello wor", "ld"),
        ("the answer", "\nyes"),
        ("the answer is ", " yes"),
    ]
    for prompt, completion in pairs:
        (row,), summary = encode_rows([Row(prompt, completion)], tokenizer, 64)
        asked = tokenizer(prompt)["input_ids"]
        assert row["input_ids"][: len(asked)] == asked  # what the model is given when it is to complete the prompt
        assert row["labels"] == [-100] * len(asked) + row["input_ids"][len(asked) :]
        assert tokenizer.decode(row["input_ids"]).removeprefix("<s>").lstrip(" ") == f"{prompt}{completion}</s>"
        assert summary.changed_borders == 0 and not summary.warnings()


def test_a_text_that_no_tokens_give_is_counted() -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, "wor": 2, "ld": 3, "world": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<unk>")
    rows, summary = encode_rows([Row("wor", "ld"), Row("wor", " ld")], tokenizer, 10)
    assert [row["input_ids"] for row in rows] == [[2, 3, 1]] * 2
    assert summary.changed_borders == 1 and "in 1 rows the tokenizer changes the text" in summary.warnings()[0]


def test_messages_without_a_template_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    row = Row(messages=(("user", SECRET), ("assistant", SECRET)), where="file:3")
    with pytest.raises(UsageError, match="no chat template") as caught:
        encode_rows([row], tokenizer, 100)
    assert caught.value.where == "file:3" and SECRET not in str(caught.value)


def test_of_several_templates_the_default_is_taken(new_tokenizer: NewTokenizer) -> None:
    tokenizer = new_tokenizer()
    tokenizer.add_tokens(["<stop>"], special_tokens=True)
    row = Row(messages=(("user", "a"), ("assistant", "b")), where="file:3")
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tool_use": "none"}
    assert encode_one(row, tokenizer) == ("[user]a<stop>[assistant]b<stop>", "b<stop>")
    tokenizer.chat_template = {"rag": CHAT_TEMPLATE, "tool_use": "none"}
    with pytest.raises(UsageError, match="one of them named default"):
        encode_rows([row], tokenizer, 100)


PARTS = (  # as SmolVLM's: it makes nothing of a text
    "{% for m in messages %}[{{ m.role }}]"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<stop>{% endfor %}"
)


@pytest.mark.parametrize("template", [PARTS, PARTS.replace("m.role }}]", "m.role }}]{% generation %}", 1)])
def test_a_template_that_leaves_out_what_is_said_is_refused(new_tokenizer: NewTokenizer, template: str) -> None:
    tokenizer = new_tokenizer()
    tokenizer.add_tokens(["<stop>"], special_tokens=True)
    tokenizer.chat_template = (
        template.replace("<stop>", "<stop>{% endgeneration %}") if "{% gen" in template else template
    )
    turns = (("user", SECRET), ("assistant", SECRET))
    for refuse in (
        lambda: encode_rows([Row(messages=turns, where="file:3")], tokenizer, 100),
        lambda: prompt_tokens(tokenizer, turns[:1], "file:3"),
    ):
        with pytest.raises(DataError, match="leaves out what a message says: got no word of the user's") as caught:
            refuse()
        assert caught.value.where == "file:3, message 0" and SECRET not in str(caught.value)
    tokenizer.chat_template = "{{ messages[-1].content | trim }}"  # the last question alone is an answer's prompt
    assert prompt_tokens(tokenizer, (("user", "before"), ("assistant", "yes"), ("user", " one ")), "x") == list(
        tokenizer("one")["input_ids"]
    )


def test_a_turn_that_spells_a_special_token_in_other_letters_is_found(new_tokenizer: NewTokenizer) -> None:
    tokenizer = new_tokenizer()
    tokenizer.add_tokens([AddedToken("|end|", special=True, normalized=True)], special_tokens=True)
    turns = [("user", "fine"), ("user", "\uff5cend\uff5c")]  # full-width bars
    assert spells_special(tokenizer, turns) is None
    tokenizer.backend_tokenizer.normalizer = NFKC()
    assert spells_special(tokenizer, turns) == 1


def test_messages_follow_the_template_of_the_tokenizer(new_tokenizer: NewTokenizer) -> None:
    tokenizer = new_tokenizer()
    tokenizer.add_tokens(["<stop>"], special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    row = Row(messages=(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")))
    text = "[user]a<stop>[assistant]b<stop>[user]c<stop>[assistant]d<stop>"
    assert encode_one(row, tokenizer) == (text, "b<stop>d<stop>")
    assert encode_one(Row("a", "b"), tokenizer) == ("ab<end>", "b<end>")


def test_the_start_of_a_template_is_not_doubled_and_survives_the_cut(new_tokenizer: NewTokenizer) -> None:
    tokenizer = new_tokenizer(bos=True)
    tokenizer.add_tokens(["<stop>"], special_tokens=True)
    tokenizer.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE
    row = Row(messages=(("user", "a"), ("assistant", "b")))
    assert encode_one(row, tokenizer) == ("<start>[user]a<stop>[assistant]b<stop>", "b<stop>")
    assert encode_one(row, tokenizer, 5) == ("<start>t]b<stop>", "b<stop>")


def test_a_long_conversation_keeps_its_last_answer(new_tokenizer: NewTokenizer) -> None:
    tokenizer = new_tokenizer()
    tokenizer.add_tokens(["<stop>"], special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    row = Row(messages=(("user", "a"), ("assistant", "bcd"), ("user", "e"), ("assistant", "fgh"), ("user", "ijk")))
    assert encode_one(row, tokenizer, 60)[1] == "bcd<stop>fgh<stop>"
    assert encode_one(row, tokenizer, 6) == ("fgh<stop>[u", "fgh<stop>")
    assert encode_one(row, tokenizer, 3) == ("fgh", "fgh")


def test_a_long_row_loses_the_left_of_its_prompt_and_only_then_the_end_of_its_completion(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    row = Row("abcdef", "xyz")
    assert encode_one(row, tokenizer, 6) == ("efxyz<end>", "xyz<end>")
    assert encode_one(row, tokenizer, 4) == ("xyz<end>", "xyz<end>")
    assert encode_one(row, tokenizer, 3) == ("xyz", "xyz")
    _, summary = encode_rows([row, row, Row("a", "b"), Row(completion="long text")], tokenizer, 3)
    assert (summary.rows, summary.tokens, summary.supervised_tokens) == (4, 12, 11)
    assert (summary.shortened_prompts, summary.dropped_prompts, summary.truncated_completions) == (2, 2, 3)


def test_a_start_token_survives_the_cut_and_carries_no_loss(new_tokenizer: NewTokenizer) -> None:
    tokenizer = new_tokenizer(bos=True)
    assert encode_one(Row("ab", "c"), tokenizer) == ("<start>abc<end>", "c<end>")
    assert encode_one(Row("ab", "c"), tokenizer, 4) == ("<start>bc<end>", "c<end>")


@given(prompt=st.text(max_size=8), completion=st.text(min_size=1, max_size=8), max_length=st.integers(2, 20))
def test_every_row_fits_and_keeps_as_much_of_its_completion_as_can_be(
    prompt: str, completion: str, max_length: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    (row,), summary = encode_rows([Row(prompt, completion)], tokenizer, max_length)
    wanted = tokenizer(completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    assert len(row["input_ids"]) == len(row["labels"]) == len(row["attention_mask"]) <= max_length
    assert [label for label in row["labels"] if label != -100] == wanted[:max_length]
    assert summary.truncated_completions == (len(wanted) > max_length)


def test_a_text_that_the_tokenizer_does_not_know_is_refused(new_tokenizer: NewTokenizer) -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, "known": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<unk>")
    encode_rows([Row(completion=f"known {SECRET}")], tokenizer, 10)
    for text in (SECRET, f"{SECRET} known {SECRET}", "\x00"):
        with pytest.raises(DataError, match=r"does not know the text.*\(at file:3\)") as caught:
            encode_rows([Row(completion=text, where="file:3")], tokenizer, 10)
        assert SECRET not in str(caught.value)


def test_a_length_without_room_and_a_tokenizer_without_an_end_are_refused(
    new_tokenizer: NewTokenizer, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UsageError, match="max_length"):
        encode_rows([Row("a", "b")], tokenizer, 1)
    endless = new_tokenizer()
    endless.eos_token = None
    with pytest.raises(UsageError, match="end-of-text"):
        encode_rows([Row("a", "b")], endless, 10)


def test_the_collator_pads_on_the_right(tokenizer: PreTrainedTokenizerFast) -> None:
    rows, _ = encode_rows([Row("a", "bc"), Row("a", "b")], tokenizer, 10)
    batch = Collator(pad_token_id=9)(rows)
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert batch["input_ids"][1].tolist() == [*rows[1]["input_ids"], 9]
    assert batch["labels"][1].tolist() == [*rows[1]["labels"], -100]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert Collator(9, pad_to_multiple_of=8)(rows)["labels"].shape == (2, 8)
    assert Collator(9, pad_to_multiple_of=4)(rows)["labels"].shape == (2, 4)


def test_the_trainer_of_transformers_takes_rows_and_collator(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=258, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=256, eos_token_id=256
    )
    model = GPT2LMHeadModel(config)
    before = model.transformer.wte.weight.detach().clone()
    rows, _ = encode_rows([Row("ask", " tell"), Row(completion="all of it")] * 4, tokenizer, 32)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    result = Trainer(model, arguments, data_collator=Collator(256), train_dataset=rows).train()
    assert result.global_step == 2
    assert torch.isfinite(torch.tensor(result.training_loss))
    assert not torch.equal(model.transformer.wte.weight, before)


def test_a_special_token_that_the_model_has_no_embedding_of_is_refused_by_line(new_tokenizer) -> None:
    """As Gemma 3's tokenizer has one of pictures; the model would end in an index error."""
    tokenizer = new_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_tokens(["<picture>"], special_tokens=True)
    for row in (Row(f"see <picture> {SECRET}", "x", where="file:3"), Row(completion="a <picture>", where="file:3")):
        with pytest.raises(
            DataError, match=rf"no embedding of: got token {rows}, expected below {rows} \(at file:3\)"
        ) as e:
            encode_rows([Row("a", "b"), row], tokenizer, 64, vocabulary=rows)
        assert SECRET not in str(e.value)
    assert encode_rows([Row("a", "b")], tokenizer, 64, vocabulary=rows)[0]
