"""What a job gives besides its adapter: completions of prompts, and the report of how the training went."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from obfuscatune.enclave.protected import Protected
from obfuscatune.parties.job import Job
from obfuscatune.parties.vocabulary import TURNS
from obfuscatune.service.placement import Placed
from obfuscatune.training.completion import Completion, complete_counted
from obfuscatune.training.data import Prompt

_BATCH = 8  # prompts completed together


def training_report(job: Job, history: Sequence[dict[str, Any]], parts: Sequence[Placed], waited: float) -> bytes:
    """Return the owner's report as JSON: losses, evaluation before and after on rows held out, and who had what.

    Args:
        job: that was run. history: the Trainer's log. parts: of the workers. waited: seconds for queries of other jobs.
            Secret: losses tell of the data.
    """
    losses = [{"step": entry["step"], "loss": entry["loss"]} for entry in history if "loss" in entry]
    held_out = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    report = {
        "job": job.digest,
        "profile": job.profile_name,
        "steps": max((entry["step"] for entry in history), default=0),
        "loss": losses,
        "held_out": {"loss_before": held_out[0], "loss_after": held_out[-1]} if held_out else None,
        "queries_of_other_jobs": {"seconds": round(waited, 3), "bound": TURNS},
        "workers": [part.to_dict() for part in parts],
    }
    return (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode()


def complete_prompts(
    protected: Protected,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    between: Callable[[], Any] = lambda: None,
) -> list[Completion]:
    """Greedy completions, in the order of the prompts; ``between`` is called after each batch."""
    rows = named(prompts)
    done: list[Completion] = []
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        done += complete_counted(protected.model, tokenizer, batch, max_new_tokens=max_new_tokens, do_sample=False)
        between()
    return done


def named(prompts: Sequence[Prompt]) -> list[tuple[str, Prompt]]:
    """Return the prompts with the names that errors give them: their numbers."""
    return [(f"prompt {number}", prompt) for number, prompt in enumerate(prompts, 1)]
