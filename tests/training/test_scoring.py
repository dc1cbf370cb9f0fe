import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from obfuscatune.errors import DataError, NotFiniteError, UsageError
from obfuscatune.training.scoring import Question, accuracy, read_questions, score_choices


def random_model(family: str) -> GPT2LMHeadModel | LlamaForCausalLM:
    torch.manual_seed(0)
    # The initial weights are large, so that the predictions differ from one question to the next.
    common = {"vocab_size": 258, "initializer_range": 0.5, "bos_token_id": 257, "eos_token_id": 256}
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **common))
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        **common,
    )
    return LlamaForCausalLM(config)


def random_questions(count: int) -> list[Question]:
    rng = random.Random(0)

    def words(longest: int) -> str:
        return "".join(rng.choices("abcdefgh", k=rng.randint(1, longest)))

    # Equal choices would tie, and rounding would choose between them.
    pool = [a + b for a in "abcdefgh" for b in ("", "a", "bc", "def")]
    return [Question(words(12), tuple(rng.sample(pool, rng.randint(2, 5))), 0) for _ in range(count)]


def reference(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, question: Question, bos: bool) -> list[float]:
    """One choice at a time, one token at a time, all logits, no padding."""
    scores = []
    for choice in question.choices:
        ids = [257] * bos + tokenizer(question.prompt, add_special_tokens=False)["input_ids"]
        score = 0.0
        for token in tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
            score += torch.log_softmax(logits, dim=-1)[token].item()
            ids.append(token)
        scores.append(score)
    return scores


@pytest.mark.parametrize(("family", "bos"), [("gpt2", False), ("llama", True)])
@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_the_choice_is_the_one_of_the_slow_reference(
    new_tokenizer: Callable[..., PreTrainedTokenizerFast], family: str, bos: bool, batch_size: int
) -> None:
    tokenizer, model, questions = new_tokenizer(bos=bos), random_model(family).eval(), random_questions(40)
    expected = [scores.index(max(scores)) for scores in (reference(model, tokenizer, q, bos) for q in questions)]
    assert len(set(expected)) > 2
    assert score_choices(model, tokenizer, questions, batch_size) == expected


def test_a_model_that_gives_all_logits_is_scored_like_one_that_gives_the_chosen(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model, questions = random_model("gpt2"), random_questions(20)
    expected = score_choices(model, tokenizer, questions)
    stock = model.forward
    model.forward = lambda logits_to_keep=0, **more: stock(**more)  # type: ignore[method-assign]
    assert score_choices(model, tokenizer, questions) == expected


def test_dropout_is_off_while_scoring_and_the_mode_comes_back(tokenizer: PreTrainedTokenizerFast) -> None:
    model, questions = random_model("gpt2"), random_questions(20)
    expected = score_choices(model.eval(), tokenizer, questions)
    assert score_choices(model.train(), tokenizer, questions) == expected
    assert model.training
    score_choices(model.eval(), tokenizer, questions)
    assert not model.training


def test_a_question_beyond_the_positions_of_the_model_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    fits = Question("p" * 29, ("ab", "cd"), 0)
    score_choices(random_model("gpt2"), tokenizer, [fits])
    with pytest.raises(UsageError, match="got 33 tokens, expected at most 32 \\(at question 1\\)") as caught:
        score_choices(random_model("gpt2"), tokenizer, [fits, Question("p" * 29, ("ab", "zzz"), 0)])
    assert "zzz" not in str(caught.value)


def test_a_question_with_a_token_beyond_the_embedding_is_refused(new_tokenizer: Any) -> None:
    tokenizer, model = new_tokenizer(), random_model("gpt2")
    tokenizer.add_tokens(["<picture>"], special_tokens=True)
    with pytest.raises(DataError, match="no embedding of") as caught:
        score_choices(model, tokenizer, [Question("p", ("zzz <picture>", "b"), 0)])
    assert "zzz" not in str(caught.value)


def test_accuracy_is_the_share_of_right_answers() -> None:
    questions = [Question("q", ("a", "b"), answer) for answer in (0, 1, 1, 0)]
    assert accuracy([0, 1, 0, 0], questions) == 0.75
    with pytest.raises(ValueError, match="zip"):
        accuracy([0], questions)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 2}, "'answer' names no choice: got int, expected an index from 0 to 1"),
        ({"answer": -1}, "'answer' names no choice"),
        ({"answer": True}, "'answer' names no choice: got bool"),
        ({"answer": "zebra"}, "'answer' names no choice: got str"),
        ({"choices": ["zebra"]}, "'choices' is not a choice: got 1 items"),
        ({"choices": "zebra"}, "'choices' is not a choice: got str"),
        ({"choices": ["zebra", 1]}, "'choices' has the wrong type"),
        ({"choices": ["zebra", ""]}, "'choices' is empty"),
        ({"question": ""}, "'question' is empty"),
        ({"prompt": "zebra"}, "unknown key 'prompt'"),
    ],
)
def test_a_bad_question_is_refused_without_its_content(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "questions.jsonl"
    good = {"question": "zebra", "choices": ["a", "b"], "answer": 1}
    path.write_text(json.dumps(good) + "\n")
    assert read_questions(path) == [Question("zebra", ("a", "b"), 1)]
    assert "zebra" not in repr(read_questions(path))
    path.write_text(json.dumps(good | change) + "\n")
    with pytest.raises(DataError) as caught:
        read_questions(path)
    assert message in str(caught.value)
    assert "zebra" not in str(caught.value)


@pytest.mark.parametrize(("name", "count"), [("sciq", 1000), ("piqa", 1838), ("obqa", 500)])
def test_the_real_sets_are_read(shared: Path, name: str, count: int) -> None:
    assert len(read_questions(shared / "data" / name / "validation.jsonl")) == count


def test_no_choice_is_the_likeliest_of_what_is_no_number(tokenizer: PreTrainedTokenizerFast) -> None:
    model = random_model("gpt2")
    model.transformer.ln_f.bias.data[0] = float("nan")
    with pytest.raises(NotFiniteError, match="the logits of the model are not finite"):
        score_choices(model, tokenizer, random_questions(2))
