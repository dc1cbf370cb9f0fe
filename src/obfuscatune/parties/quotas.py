"""Quotas: how much of the enclave the jobs of one sealed input may use, as its owner's terms state it.

    max_jobs             jobs that ever start with this sealed file, in one enclave
    max_training_tokens  in one job: optimizer steps x rows of a step x `max_length`, however short the rows are
    max_new_tokens       of the longest completion, of the job's prompts and of queries
    max_stored_bytes     that the sealed checkpoint and results of one job take in the enclave's store

A quota that is left out is 0, which refuses every job. Of several inputs, each one's quotas hold. There is none of
hours: the enclave's clock is the operator's. Padded tokens bound the work, and they tell nothing of how long rows are.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from obfuscatune.errors import ConsentError
from obfuscatune.settings import TrainingSettings


@dataclass(frozen=True)
class Quota:
    """One quota: its name in the terms, the greatest that terms may state, what the template has, and of what."""

    name: str
    greatest: int
    template: int
    what: str


QUOTAS = (
    Quota("max_jobs", 1_000_000, 10, "jobs that ever start with one sealed file"),
    Quota("max_training_tokens", 1 << 53, 10_000_000, "in one job: steps x rows of a step x max_length"),
    Quota("max_new_tokens", 65_536, 512, "of the longest completion"),
    Quota("max_stored_bytes", 1 << 53, 1 << 30, "of one job's checkpoint and results in the enclave's store"),
)


class Given(Protocol):
    """Terms, as far as quotas go."""

    @property
    def max_jobs(self) -> int: ...  # noqa: D102
    @property
    def max_training_tokens(self) -> int: ...  # noqa: D102
    @property
    def max_new_tokens(self) -> int: ...  # noqa: D102
    @property
    def max_stored_bytes(self) -> int: ...  # noqa: D102
    @property
    def max_queries(self) -> int: ...  # noqa: D102


def training_tokens(settings: TrainingSettings, rows: int | None = None) -> int | None:
    """Return the most tokens that a training computes on, counted as `max_training_tokens` counts them.

    Args:
        settings: of the job. rows: of the data, where they are known; without, passes over the data have no bound here.
    """
    batch, each = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    steps = settings.max_steps
    if steps <= 0:
        if rows is None:
            return None
        steps = math.ceil(settings.num_train_epochs * max(1, math.ceil(math.ceil(rows / batch) / each)))
    return steps * batch * each * settings.max_length


def uses(settings: TrainingSettings, max_new_tokens: int) -> dict[str, int]:
    """Return what a job asks for of each quota, as far as the job alone tells."""
    tokens = training_tokens(settings)
    least = {"max_jobs": 1, "max_stored_bytes": 1, "max_new_tokens": max_new_tokens}
    return {**least, "max_training_tokens": 1 if tokens is None else tokens}


def faults(given: Given, settings: TrainingSettings, max_new_tokens: int) -> list[str]:
    """Return in which quotas a job goes beyond terms, as far as the job alone tells."""
    asked = uses(settings, max_new_tokens)
    return [
        f"{quota.name}: {asked[quota.name]:,} (allowed: {allowed:,})"
        for quota in QUOTAS
        if asked[quota.name] > (allowed := getattr(given, quota.name))
    ]


def require(terms: Mapping[str, Given], name: str, asked: int, parts: str = "") -> None:
    """Refuse what goes beyond the quota ``name``, or `max_queries`, of one of the inputs' terms, given by kind.

    Args:
        terms: by kind. name: of the quota. asked: how much. parts: what it is made of, in words.

    Raises:
        ConsentError: it names the quota and the input, and the bound; no content.
    """
    for kind, given in terms.items():
        allowed = getattr(given, name)
        if asked > allowed:
            got = f"{asked:,} ({parts})" if parts else f"{asked:,}"
            whose = f"{kind}'" if kind.endswith("s") else f"{kind}'s"
            raise ConsentError(f"{name} of the {whose} terms", got=got, expected=f"at most {allowed:,}")
