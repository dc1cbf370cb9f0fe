"""One job as the book has it: how far it is, what came out, who had what."""

from dataclasses import dataclass, field
from typing import Any

# Of a job that runs no more. One that has failed may be submitted again, and resumes.
ENDED = ("done", "refused", "cancelled", "deleted")


@dataclass(frozen=True)
class Record:
    """One job in the book. ``signed`` is its file in base64; ``order`` its place in the queue.

    Attributes:
        status: as in the drawing at the head of `book`. reason: why it was refused or failed: the class of the error,
            of a refusal what it is about.
        step, steps: how far the training is, and where it ends. checkpoint: digest of the last one.
        results: digests of sealed results, by kind. queries: prompts answered so far. starts: since the last
            checkpoint. workers: what each has got of the model, as `placement` tells. cancelled: whether a party has
            asked for the end of a running job.
    """

    signed: str
    order: int
    status: str = "waiting"
    reason: str = ""
    step: int = 0
    steps: int = 0
    checkpoint: str | None = None
    results: dict[str, str] = field(default_factory=dict)
    queries: int = 0
    starts: int = 0
    workers: list[dict[str, Any]] = field(default_factory=list)
    cancelled: bool = False
