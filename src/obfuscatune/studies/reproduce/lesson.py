"""A short fine-tuning through keys in one process: LoRA on a model of `keyed`, taught the bundled records."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

from obfuscatune.studies.bundled.records import company_records
from obfuscatune.training.data import Row
from obfuscatune.training.encoding import IGNORED_LABEL, Collator, encode_rows
from obfuscatune.training.scoring import Question, accuracy, score_choices

# float16 has no numbers below 6e-8, and gradients of a mean over tokens do. Mixed-precision training multiplies the
# loss; AdamW does not care.
LOSS_SCALE = 1024.0


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """Settings of the fine-tuning; the defaults are the demo's.

    Args:
        seed: of the records, of the adapter's start and of the order of rows.
        facts, steps, batch_size, learning_rate, warmup_steps, r, alpha: see `obfuscatune.studies.bundled.DemoSettings`.
    """

    seed: int = 0
    facts: int = 32
    steps: int = 300
    batch_size: int = 16
    learning_rate: float = 3e-3
    warmup_steps: int = 20
    r: int = 16
    alpha: int = 32
    max_length: int = 40


def records(lesson: Lesson) -> tuple[list[Row], list[Question]]:
    """Return the rows to learn and the questions to ask: one a fact, in words that are in no row."""
    rows, questions = company_records(lesson.seed, lesson.facts)
    return (
        [Row(row["prompt"], row["completion"]) for row in rows],
        [Question(each["question"], tuple(each["choices"]), each["answer"]) for each in questions],
    )


def teach(model: Any, trained: Sequence[nn.Parameter], tokenizer: Any, lesson: Lesson) -> list[float]:
    """Train ``trained`` with AdamW, a linear schedule and clipping; return the loss of each step.

    A step whose gradient is not finite is left out, as mixed-precision training does; its loss is kept as it was.
    """
    rows, _ = encode_rows(records(lesson)[0], tokenizer, lesson.max_length)
    optimizer = torch.optim.AdamW(trained, lr=lesson.learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, lesson.warmup_steps, lesson.steps)  # type: ignore[no-untyped-call]
    collate, generator = Collator(pad_token_id=0), torch.Generator().manual_seed(lesson.seed)
    device = trained[0].device
    scale = LOSS_SCALE if next(model.parameters()).dtype == torch.float16 else 1.0
    losses = []
    for _ in range(lesson.steps):
        chosen = torch.randint(len(rows), (lesson.batch_size,), generator=generator).tolist()
        batch = collate([rows[index] for index in chosen])
        loss = _loss(model, batch["input_ids"].to(device), batch["labels"].to(device))
        losses.append(loss.item())
        optimizer.zero_grad()
        (loss * scale).backward()  # type: ignore[no-untyped-call]
        for parameter in trained:
            if parameter.grad is not None:
                parameter.grad /= scale
        if nn.utils.clip_grad_norm_(trained, 1.0).isfinite():
            optimizer.step()
        schedule.step()
    return losses


def _loss(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean over labelled tokens. Rows are padded on the right, where a causal model needs no mask."""
    targets = F.pad(labels, (0, 1), value=IGNORED_LABEL)[:, 1:]
    positions = (targets != IGNORED_LABEL).any(dim=0).nonzero().flatten()  # the head is costly
    logits = model(input_ids=ids, logits_to_keep=positions, use_cache=False).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), targets[:, positions].flatten(), ignore_index=IGNORED_LABEL)


def ask(model: Any, tokenizer: Any, lesson: Lesson) -> float:
    """Return the share of the questions that the model answers right; one in four is chance."""
    questions = records(lesson)[1]
    return accuracy(score_choices(model, tokenizer, questions), questions)
