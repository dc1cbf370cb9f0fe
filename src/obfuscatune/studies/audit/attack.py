"""The one interface of all attacks: what an attack is told, what it is scored against, and how it describes itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from obfuscatune.profiles import Profile
from obfuscatune.studies.audit.reference import Design, Reference, Streams
from obfuscatune.studies.audit.view import WorkerView

NEEDS = {
    "N": "nothing but public text",
    "B": "a public base model near the private one",
    "P": "known text in the session, with its plain activations",
    "E": "the embedding tables",
    "Q": "queries as a customer, in a session of his own",
}


class NotApplicableError(Exception):
    """The worker has nothing of the kind that the attack is about; the text says what is missing."""


@dataclass(frozen=True, slots=True, repr=False)
class Sample:
    """What the operator recorded in one session under one profile.

    Attributes:
        view: passes of other text, as many as the token budget allows.
        target: one more pass of the same session: its text is what the attacks on data are after.
        training: a session of LoRA fine-tuning of the same model under fresh keys.
    """

    view: WorkerView
    target: WorkerView
    training: WorkerView


@dataclass(frozen=True, slots=True, repr=False)
class Customer:
    """A colluding customer's own session, under keys of its own, of text that he chose."""

    view: WorkerView
    batches: Sequence[Tensor]


@dataclass(frozen=True, slots=True, repr=False)
class Knowledge:
    """What an attacker has beside the view. What an attack does not name in its needs is None.

    Attributes:
        profile: it is public, the keys are not. design: of the model. vocabulary: number of tokens.
        corpus: public text like the private one ``[n, T]``; everyone has it. library: more public text, to train on.
        base: B. pairs: P: plain streams of the view's passes, row by row. pair_tokens: P: ids of these rows.
        embeddings: E: the private model's first-block rows by ``(token, position)``, and its tables. customer: Q.
    """

    profile: Profile
    design: Design
    vocabulary: int
    corpus: Tensor
    library: Tensor
    base: Reference | None = None
    pairs: Streams | None = None
    pair_tokens: Tensor | None = None
    embeddings: "Embeddings | None" = None
    customer: Customer | None = None
    cache: dict[str, Any] = field(default_factory=dict)  # of what attacks compute from the corpus alone

    def base_streams(self) -> Streams:
        """Streams of the base on the corpus, computed once."""
        if self.base is None:
            raise NotApplicableError("no base")
        if "base streams" not in self.cache:
            self.cache["base streams"] = self.base.streams([self.corpus])
        found: Streams = self.cache["base streams"]
        return found


@dataclass(frozen=True, slots=True, repr=False)
class Embeddings:
    """The tables of tokens ``[vocab, d]`` and positions ``[n, d]``, and the first block's rows made of them."""

    words: Tensor
    positions: Tensor
    first_rows: Callable[[Tensor, Tensor], Tensor]  # tokens [n], positions [n] -> [n, d]


@dataclass(frozen=True, slots=True, repr=False)
class TrainingTruth:
    """What the training session was about: one batch a pass pair, its loss mask, and the adapter.

    Attributes:
        batches: tokens ``[B, T]`` of each step. scored: bool ``[B, T]``, rows whose logits enter the loss (the labels
            are shifted). rank: of LoRA. keys: of that session, as in `Truth`.
    """

    batches: Sequence[Tensor]
    scored: Sequence[Tensor]
    rank: int
    keys: dict[tuple[int, str], Tensor]


@dataclass(frozen=True, slots=True, repr=False)
class Truth:
    """What only the enclave knows; scores see it, attacks do not.

    Attributes:
        private: the private model. base: the public one it was fine-tuned from.
        tokens: ids of the view's rows ``[n]``. target_tokens: ids of the target's rows. target_shape: ``(B, T)``.
        streams, target_streams: plain rows of both. keys: dense keys ``[size, size]`` by block and stream, where a key
            of its own is on that stream.
    """

    private: Reference
    base: Reference
    tokens: Tensor
    target_tokens: Tensor
    target_shape: tuple[int, int]
    streams: Streams
    target_streams: Streams
    keys: dict[tuple[int, str], Tensor]
    training: TrainingTruth


@dataclass(frozen=True, slots=True)
class Score:
    """How far an attack got: ``success``, 1 at the most; what guessing gives; a figure of its own where it has one.

    Attributes:
        value: in the attack's metric (an error, a perplexity); None where that is the success.
    """

    success: float
    chance: float
    value: float | None = None


@dataclass(frozen=True, kw_only=True)
class Attack:
    """One attack.

    Attributes:
        id: as in docs/security.md, ``A1``. title: a few words. needs: letters of `NEEDS`, "N" where none.
        source: paper or where it is derived. metric: what success is. chance: what guessing gives, in words.
        run: ``(sample, knowledge) -> guess``. Raises NotApplicableError.
        score: ``(guess, truth) -> Score``.
        fires_on: a profile on which it must succeed, or the run proves nothing; ``fires_at``: the least success there.
        by_tokens: whether more text helps; else it is run once, on the largest budget.
        largest: the most tokens per width that it is run with (cost); None for all budgets.
        sham: run instead as the negative control, without what the attack lives on, where another model's session
            would be no control.
        exact: whether its positive control has the private model itself as the base: how near a base must be is what
            the attack is to show.
    """

    id: str
    title: str
    needs: str
    source: str
    metric: str
    chance: str
    run: Callable[[Sample, Knowledge], Any]
    score: Callable[[Any, Truth], Score]
    fires_on: str
    fires_at: float
    by_tokens: bool = True
    largest: int | None = None
    sham: Callable[[Sample, Knowledge], Any] | None = None
    exact: bool = False


def top1(guess: Tensor, truth: Tensor) -> Score:
    """Share of tokens guessed right, row by row; the chance is to say the most frequent one always."""
    length = min(len(guess), len(truth))
    success = (guess[:length] == truth[:length]).double().mean().item() if length else 0.0
    frequent = truth.bincount().max().item() / len(truth)
    return Score(success, frequent)


def recovered(error: float, chance: float = 0.0) -> Score:
    """A relative error as a success: ``1 - error``, at least 0."""
    return Score(max(0.0, 1.0 - error), chance, error)


def area_under_curve(positive: Tensor, negative: Tensor) -> Score:
    """AUC of a statistic that should be larger for the first; as a success ``2 AUC - 1``, 0 on average by chance."""
    if not len(positive) or not len(negative):
        raise NotApplicableError("one of the two classes is empty")
    ordered = negative.double().sort().values
    below = sum(torch.searchsorted(ordered, positive.double(), right=right) for right in (False, True))
    auc = (below / 2).mean().item() / len(ordered)  # type: ignore[union-attr]
    return Score(2 * auc - 1, 0.0, auc)
