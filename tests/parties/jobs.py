"""Two owners, and a job of theirs in which every right is used."""

import time
from typing import Any

from obfuscatune.parties.identity import Identity
from obfuscatune.parties.job import Job, SignedJob

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


def sign(job: Job, *parties: Identity) -> SignedJob:
    signed = SignedJob(job)
    for party in parties or (LAB, CLINIC):
        signed = signed.sign(party)
    return signed
