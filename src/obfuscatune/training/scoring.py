"""Multiple choice by likelihood: which choice does a causal language model find most probable after the prompt."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from obfuscatune.errors import DataError, UsageError
from obfuscatune.training.encoding import (
    IGNORED_LABEL,
    Collator,
    check_embedded,
    pair_tokens,
    positions_of,
    start_tokens,
    vocabulary_of,
)
from obfuscatune.training.finite import check_logits
from obfuscatune.training.jsonl import check_keys, check_text, read_objects


@dataclass(frozen=True)
class Question:
    """A multiple-choice question; its texts stay out of ``repr``.

    Args:
        prompt: what is asked.
        choices: two or more, without the space that separates them from the prompt.
        answer: index of the right one.
    """

    prompt: str = field(repr=False)
    choices: tuple[str, ...] = field(repr=False)
    answer: int = field(repr=False)


def read_questions(path: str | Path) -> list[Question]:
    """Read ``{"question", "choices", "answer"}`` rows; ``id``, ``support`` and ``meta`` may be there and are not used.

    Raises:
        UsageError: the file cannot be read.
        DataError: a row is anything else.
    """
    return [_question(row, where) for where, row in read_objects(path)]


def _question(row: dict[str, Any], where: str) -> Question:
    check_keys(row, frozenset({"question", "choices", "answer"}), frozenset({"id", "support", "meta"}), where)
    prompt, choices, answer = check_text(row["question"], "question", where), row["choices"], row["answer"]
    if not isinstance(choices, list) or len(choices) < 2:
        got = f"{len(choices)} items" if isinstance(choices, list) else type(choices).__name__
        raise DataError("'choices' is not a choice", got=got, expected="a list of two or more", where=where)
    texts = tuple(check_text(choice, "choices", where) for choice in choices)
    if type(answer) is not int or not 0 <= answer < len(texts):  # a bool is an int to isinstance
        expected = f"an index from 0 to {len(texts) - 1}"
        raise DataError("'answer' names no choice", got=type(answer).__name__, expected=expected, where=where)
    return Question(prompt, texts, answer)


def score_choices(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], batch_size: int = 32
) -> list[int]:
    """Return the index of the most probable choice of each question.

    ``argmax_j sum_t log p(c[j, t] | prompt, c[j, :t])`` with c[j] the tokens of a space and choice j: the "acc" of
    lm-evaluation-harness, not normalized by length. Logits are computed from the first to the last scored position of a
    batch only, and the log-softmax in float32. The model is in evaluation mode meanwhile.

    Raises:
        UsageError: a prompt with a choice exceeds the model's positions, or has a token that it has no embedding of.
        NotFiniteError: the model's logits.
    """
    rows = [row for index, question in enumerate(questions) for row in _choice_rows(question, index, model, tokenizer)]
    was_training = model.training
    model.eval()
    try:
        scores = [s for i in range(0, len(rows), batch_size) for s in _scores(model, rows[i : i + batch_size])]
    finally:
        model.train(was_training)
    remaining = iter(scores)
    predicted = []
    for question in questions:
        of_choices = [next(remaining) for _ in question.choices]
        predicted.append(of_choices.index(max(of_choices)))
    return predicted


def accuracy(predicted: Sequence[int], questions: Sequence[Question]) -> float:
    """Share of the questions whose predicted index is the answer's."""
    right = sum(p == question.answer for p, question in zip(predicted, questions, strict=True))
    return right / len(questions)


def _choice_rows(
    question: Question, index: int, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, list[int]]]:
    positions, vocabulary = positions_of(model.config), vocabulary_of(model.config)
    rows = []
    for choice in question.choices:
        prompt, tokens, _ = pair_tokens(tokenizer, question.prompt, f" {choice}")
        prompt = start_tokens(tokenizer) + prompt
        ids = prompt + tokens
        check_embedded(ids, vocabulary, f"question {index}")
        if positions is not None and len(ids) > positions:
            raise UsageError(
                "a prompt with its choice is too long for the model",
                got=f"{len(ids)} tokens",
                expected=f"at most {positions}",
                where=f"question {index}",
            )
        labels = [IGNORED_LABEL] * len(prompt) + tokens
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return rows


@torch.inference_mode()
def _scores(model: torch.nn.Module, rows: list[dict[str, list[int]]]) -> list[float]:
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in Collator(pad_token_id=0)(rows).items()}
    # The logits at position t are of token t + 1.
    targets = batch.pop("labels")[:, 1:]
    scored = (targets != IGNORED_LABEL).any(dim=0).nonzero().flatten()
    keep = torch.arange(int(scored[0]), int(scored[-1]) + 1, device=device)
    logits = model(**batch, logits_to_keep=keep, use_cache=False).logits
    if logits.shape[1] != len(keep):  # of a model that swallows the argument unread, such as xLSTM
        logits = logits[:, keep]
    check_logits(logits)
    targets = targets[:, keep]
    log_probabilities = torch.log_softmax(logits.float(), dim=-1)
    picked = log_probabilities.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return list(picked.masked_fill(targets == IGNORED_LABEL, 0.0).sum(dim=-1).tolist())
