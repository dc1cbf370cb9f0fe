"""A job in words, for those who sign it: everything that the signature covers, defaults too, and what it means."""

import dataclasses
import time
from collections.abc import Mapping, Sequence

from obfuscatune.errors import printable
from obfuscatune.parties.exposure import statement
from obfuscatune.parties.job import Job, SignedJob
from obfuscatune.parties.quotas import QUOTAS, training_tokens, uses
from obfuscatune.parties.terms import Terms
from obfuscatune.parties.vocabulary import TURNS
from obfuscatune.settings import TrainingSettings

_TERA = 1e12


def review(signed: SignedJob, *, model_bytes: int | None = None, terms: Mapping[str, Terms] | None = None) -> list[str]:
    """Return what a party reads before it signs, in lines.

    Args:
        signed: the job. model_bytes: of the sealed model, where its card or file is here; for the estimate. terms: by
            whose they are, where they are known: the quotas that hold for the job.
    """
    job = signed.job
    lines = [
        _line("digest", job.digest),
        *[_line(role, getattr(job, role)) for role in ("provider", "owner", "enclave")],
        *[_line(kind, digest) for kind, digest in job.inputs.items()],
        *([] if job.prompts else [_line("prompts", "none")]),
        _line("created", _time(job.created)),
        _line("expires", _time(job.expires)),
        "",
        _line("profile", job.profile_name),
        *[_line("  hides", text) for text in statement(job.resolved)],
        *_workers(job),
        "",
        *[
            _line(name, " and ".join(getattr(job, name)) or "nobody")
            for name in ("adapter_to", "generations_to", "queries_by")
        ],
        _line("report_to", "owner"),
        _line("max_queries", job.max_queries),
        _line("max_new_tokens", job.max_new_tokens),
        _line("while it runs", TURNS),
        _line("dtype", job.dtype),
        "",
        *_training(job),
        "",
        *[_line("estimate", text) for text in estimate(job, model_bytes)],
        "",
        *[line for whose, given in (terms or {}).items() for line in _quotas(job, whose, given)],
        *[
            _line("signed by", f"{job.role_of(public.fingerprint)} {public.name}  {public.fingerprint}")
            for public, _ in signed.signatures
        ],
    ]
    return lines + [_line("not signed", f"by the {role}") for role in signed.missing()]


def estimate(job: Job, model_bytes: int | None) -> list[str]:
    """Return how much there is to compute, as far as the job tells: bounds, and no promise of a time."""
    settings = job.settings
    rows = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    tokens = rows * settings.max_length
    steps = settings.max_steps if settings.max_steps > 0 else None
    each = f"a step is {rows} rows, at most {tokens:,} tokens"
    if steps is None:
        return [f"{settings.num_train_epochs:g} passes over the data, whose rows only its owner can count; {each}"]
    lines = [f"{steps} steps; {each}: at most {training_tokens(settings):,} tokens"]
    if model_bytes is not None:
        # A LoRA step takes about 4 multiply-adds a parameter and token: forward, and backward for activations alone.
        count = model_bytes / {"float64": 8, "float32": 4, "bfloat16": 2}[job.dtype]
        work = 8 * count * steps * tokens
        rates = ", ".join(f"{_seconds(work / (rate * _TERA))} at {rate:g} TFLOP/s" for rate in (0.05, 1, 100))
        lines.append(f"about {count / 1e6:,.1f} million parameters, at most {work / _TERA:,.3g} TFLOP: {rates}")
        factor = {"enclave": 1, "shared": 10}.get(job.profile, 2)
        if factor > 1:
            lines.append(f"by way of workers about {factor} times that time, more over slow links (bench measures it)")
    return lines


def _quotas(job: Job, whose: str, terms: Terms) -> list[str]:
    asked = uses(job.settings, job.max_new_tokens)
    known = {"max_new_tokens"} | ({"max_training_tokens"} if job.settings.max_steps > 0 else set())
    lines = [_line(f"quotas of {whose}", "the enclave refuses, or ends, a job that goes beyond them")]
    for quota in QUOTAS:
        used = f"{asked[quota.name]:,} of " if quota.name in known else "at most "
        lines.append(_line(f"  {quota.name}", f"{used}{getattr(terms, quota.name):,}: {quota.what}"))
    return [*lines, ""]


def _workers(job: Job) -> list[str]:
    if not job.resolved.remote:
        return [_line("workers", "none")]
    if not job.workers:
        return [_line("workers", "whom the enclave's operator chooses")]
    return [_line("worker", f"{printable(worker.operator)}  {worker.fingerprint}") for worker in job.workers]


def _training(job: Job) -> Sequence[str]:
    lines = []
    for field in dataclasses.fields(TrainingSettings):
        value = getattr(job.settings, field.name)
        shown = ", ".join(map(printable, value)) if isinstance(value, list) else value
        if value is None:
            shown = "all layers of a block" if field.name == "lora_target_modules" else "all"
        lines.append(_line(field.name, f"{printable(shown)}{'' if field.name in job.training else '  (default)'}"))
    return lines


def _line(name: str, value: object) -> str:
    return f"{name:28} {value}"


def _time(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(min(seconds, 253_402_300_799)))


def _seconds(count: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if count >= 2 * size:
            return f"{count / size:,.0f} {unit}"
    return f"{count:,.1f} seconds"
