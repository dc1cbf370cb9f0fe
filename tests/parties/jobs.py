"""Two owners, and a job of theirs in which every right is used."""

import time
from typing import Any

from obfuscatune.parties.exposure import line
from obfuscatune.parties.identity import Identity
from obfuscatune.parties.job import Job, SignedJob
from obfuscatune.parties.vocabulary import profile_named

LAB, CLINIC = Identity.generate("lab", "x25519"), Identity.generate("clinic", "x25519")
STRANGER = Identity.generate("stranger", "x25519")


def job_fields(enclave: str = "ee" * 32, **changes: Any) -> dict[str, Any]:
    """The arguments of a job in which every right is used."""
    now = int(time.time())
    return {
        "provider": LAB.public.fingerprint,
        "owner": CLINIC.public.fingerprint,
        "enclave": enclave,
        "model": "aa" * 32,
        "data": "bb" * 32,
        "prompts": "cc" * 32,
        "profile": "balanced",
        "switches": {"mlp": "enclave"},
        "training": {"learning_rate": 1e-3, "max_steps": 4, "lora_target_modules": ["c_attn"]},
        "adapter_to": ("owner",),
        "generations_to": ("owner",),
        "queries_by": ("owner",),
        "max_queries": 10,
        "created": now - 1,
        "expires": now + 3600,
        **changes,
    }


WEAK = ("balanced", "balanced+mlp=enclave")


def terms(*profiles: str, **changes: Any) -> dict[str, Any]:
    """Terms that give all that a job of `job_fields` asks for, under these profiles, with the lines that they need."""
    given = profiles or ("enclave", *WEAK)
    return {
        "version": 3,
        "profiles": list(given),
        "shows": {name: text for name in given if (text := line(profile_named(name)))},
        "adapter_to": ["provider", "owner"],
        "generations_to": ["provider", "owner"],
        "queries_by": ["provider", "owner"],
        "max_queries": 1000,
        "max_jobs": 1000,
        "max_training_tokens": 1_000_000,
        "max_new_tokens": 64,
        "max_stored_bytes": 1 << 24,
        "partners": "any",
        "expires": "never",
        "workers": "any",
        **changes,
    }


def sign(job: Job, *parties: Identity) -> SignedJob:
    signed = SignedJob(job)
    for party in parties or (LAB, CLINIC):
        signed = signed.sign(party)
    return signed
