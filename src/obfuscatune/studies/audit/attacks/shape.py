"""A22, shapes: the length of each text of a fine-tuning session, from what no key hides.

In this order, as far as each crosses:

1. the attention mask, which shows where each text ends;
2. zero rows of the gradient at the last block's output: the last token in the loss is followed by the text's end;
3. the number of rows alone: all texts are taken to be as long as public ones are.

Besides, the number of rows of each request: exact, or the largest of its size where it is padded. Cadence tells more
of a session that generates: there each token is a request of its own, under every profile; it is not scored here.

Source: A22 in docs/security.md; sizes of encrypted replies: Weiss et al., arXiv 2403.09751.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from obfuscatune.enclave.keys.rows import mixed_rows
from obfuscatune.enclave.mixing import padded_rows
from obfuscatune.studies.audit.attack import Attack, Knowledge, NotApplicableError, Sample, Score, Truth
from obfuscatune.studies.audit.view import Call, WorkerView

_ZERO = 1e-6  # of the largest norm


@dataclass(frozen=True, slots=True, repr=False)
class Sizes:
    """Lengths of the texts of each training step, and tokens of each pass of inference."""

    lengths: list[Tensor]
    tokens: list[int]


def tokens_of(call: Call) -> int:
    """Tokens of a first call: exact, or as many as fit its padded size."""
    shape = call.inputs["x"].shape
    if not call.mixed:
        return shape[0] * shape[1]
    fitting = (n for n in range(shape[1], 7, -1) if padded_rows(n) == n and mixed_rows(n + shape[2]) == shape[1])
    return next(fitting, shape[1])


def _lengths(view: WorkerView, forward: int, typical: int) -> Tensor:
    """Lengths of a step's texts: pass ``forward`` and the one after it."""
    call = view.passes[forward][0]
    if call.mask is not None:
        lengths: Tensor = call.mask[:, 0, -1].sum(dim=1)
        return lengths
    texts, length = (tokens_of(call) // typical, typical) if call.mixed else call.inputs["x"].shape[:2]
    gradients = view.only(slice(forward + 1, forward + 2)).rows(view.blocks - 1, "gradient of mlp out")
    if len(gradients) < texts * length:
        return torch.full((texts,), length)
    norms = gradients[: texts * length].norm(dim=1).view(texts, length)
    last = (norms > _ZERO * norms.max()).long() * torch.arange(length)
    # The last label is the last token, and it is predicted one earlier. Nothing is after the last position.
    ends: Tensor = (last.amax(dim=1) + 2).clamp_max(length)
    return ends


def _run(sample: Sample, knowledge: Knowledge) -> Sizes:
    view, typical = sample.training, knowledge.corpus.shape[1]
    forward = [i for i, calls in enumerate(view.passes) if calls and not calls[0].backward]
    if not forward:
        raise NotApplicableError("no request crosses")
    tokens = [tokens_of(calls[0]) for calls in sample.view.passes]
    return Sizes([_lengths(view, i, typical) for i in forward], tokens)


def _score(guess: Sizes, truth: Truth) -> Score:
    ends, right = [], 0
    for guessed, scored in zip(guess.lengths, truth.training.scored, strict=False):
        place = torch.arange(scored.shape[1])
        true = (scored.long() * place).amax(dim=1) + 2
        ends.append(true)
        length = min(len(true), len(guessed))
        right += int((guessed[:length] == true[:length]).sum())
    every = torch.cat(ends)
    error = abs(sum(guess.tokens) - len(truth.tokens)) / len(truth.tokens)
    return Score(right / len(every), every.bincount().max().item() / len(every), error)


ATTACK = Attack(
    id="A22",
    title="shapes",
    needs="N",
    source="A22 in docs/security.md; arXiv 2403.09751",
    metric="share of texts whose length is right; value: relative error of the number of tokens served",
    chance="the most frequent length's share",
    run=_run,
    score=_score,
    fires_on="balanced",
    fires_at=0.99,
    by_tokens=False,
)
