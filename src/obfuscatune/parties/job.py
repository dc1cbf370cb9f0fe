"""A job: the contract between model provider and data owner that an enclave carries out, once.

It names its inputs by the digests of their sealed files, the enclave by its attested fingerprint, everything that
decides what is computed and shown, and who gets what. Both parties sign its canonical form; the digest of that form is
the job's name. A job file is

    {"job": {...}, "signatures": [{"identity": {...}, "signature": "..."}, ...]}

in canonical JSON, with a signature of context "job" by each party. A changed option is another job, without signatures.
"""

import base64
import hashlib
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from obfuscatune.errors import ConsentError, FormatError
from obfuscatune.parties.canonical import decode, encode
from obfuscatune.parties.files import read_small
from obfuscatune.parties.identity import Identity, PublicIdentity
from obfuscatune.parties.vocabulary import (
    MAX_QUERIES,
    ROLES,
    Role,
    Worker,
    is_digest,
    operators_of,
    profile_of,
    workers_from,
)
from obfuscatune.profiles import Profile
from obfuscatune.settings import TrainingSettings

FORMAT = "obfuscatune job 2"
MAX_JOB_BYTES = 65_536
_CONTEXT = "job"
_DTYPES = ("float32", "float64", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be done; nothing in it is secret, and it is shown to all three parties.

    Attributes:
        provider, owner, enclave: fingerprints of the identities. model, data, prompts: digests of sealed files; without
            prompts there are no generations.
        profile, switches: what the worker sees. workers: who they are, by identity and operator; without them, whom the
            enclave's operator chooses. A profile that shares names them all, each of another operator.
        dtype: of the weights. training: settings that are not the defaults.
        max_new_tokens: longest completion, of the job's prompts and of queries.
        adapter_to, generations_to: roles whose identities the results are sealed to.
        queries_by, max_queries: roles who may ask the running enclave, and how many prompts in all.
        created, expires: Unix seconds. nonce: 64 hex digits, so that no two jobs are the same.
    """

    provider: str
    owner: str
    enclave: str
    model: str
    data: str
    prompts: str | None = None
    profile: str = "enclave"
    switches: dict[str, Any] = field(default_factory=dict)
    workers: tuple[Worker, ...] = ()
    dtype: str = "float32"
    training: dict[str, Any] = field(default_factory=dict)
    max_new_tokens: int = 32
    adapter_to: tuple[Role, ...] = ()
    generations_to: tuple[Role, ...] = ()
    queries_by: tuple[Role, ...] = ()
    max_queries: int = 0
    created: int = field(default_factory=lambda: int(time.time()))
    expires: int
    nonce: str = field(default_factory=lambda: os.urandom(32).hex())

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            FormatError: a value of a wrong type or out of range; all faults in one message.
        """
        faults = [f"{name} is not 64 hex digits" for name in _HEXES if not is_digest(getattr(self, name))]
        if self.prompts is not None and not is_digest(self.prompts):
            faults.append("prompts is not 64 hex digits")
        for name in ("adapter_to", "generations_to", "queries_by"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or list(value) != [role for role in ROLES if role in value]:
                faults.append(f"{name} is not a list of {' and '.join(ROLES)}")
        for name, least, greatest in _NUMBERS:
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= greatest:
                faults.append(f"{name} is not a whole number from {least} to {greatest}")
        if self.dtype not in _DTYPES:
            faults.append(f"dtype is not one of {', '.join(_DTYPES)}")
        if not faults and self.expires <= self.created:
            faults.append("it expires before it was made")
        if self.provider == self.owner:
            faults.append("provider and owner are the same identity")
        if faults:
            raise FormatError("job does not fit", got="; ".join(faults))
        workers_from(self.workers, "workers of the job")
        _check_workers(self.workers, self.resolved)
        _ = self.settings  # raises FormatError, too

    @property
    def resolved(self) -> Profile:
        """The profile with its switches."""
        return profile_of(self.profile, self.switches)

    @property
    def profile_name(self) -> str:
        """The name of the profile with its switches, as terms list it."""
        return self.resolved.name

    @property
    def settings(self) -> TrainingSettings:
        """The training settings, checked."""
        return TrainingSettings.from_dict(self.training, "training settings of the job")

    @property
    def inputs(self) -> dict[str, str]:
        """Digests of the sealed files that the job needs, by kind."""
        found = {"model": self.model, "data": self.data, "prompts": self.prompts}
        return {kind: digest for kind, digest in found.items() if digest is not None}

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical form, as 64 hex digits: the job's name."""
        return hashlib.sha256(encode(self.to_dict())).hexdigest()

    def role_of(self, fingerprint: str) -> Role | None:
        """Return the role of an identity in this job."""
        return next((role for role in ROLES if getattr(self, role) == fingerprint), None)

    def to_dict(self) -> dict[str, Any]:
        """Return the canonical fields."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {"format": FORMAT, **plain, "workers": [worker.to_dict() for worker in self.workers]}

    @classmethod
    def from_dict(cls, fields: Any) -> "Job":
        """Return the job of canonical fields; raises FormatError where one is missing, unknown or wrong."""
        names = {"format", *cls.__dataclass_fields__}
        if isinstance(fields, dict) and fields.get("format") == "obfuscatune job 1":
            hint = "propose it anew, and let both sign it: it now says which workers take part"
            raise FormatError("a job of an older version", got="obfuscatune job 1", expected=FORMAT, hint=hint)
        if not isinstance(fields, dict) or set(fields) != names or fields["format"] != FORMAT:
            raise FormatError("not a job of this version", expected=FORMAT)
        values = {name: value for name, value in fields.items() if name != "format"}
        for name in ("adapter_to", "generations_to", "queries_by"):
            if not isinstance(values[name], list) or not all(type(item) is str for item in values[name]):
                raise FormatError(f"job's {name} is not a list")
            values[name] = tuple(values[name])
        values["workers"] = workers_from(values["workers"], "workers of the job")
        return cls(**values)


_HEXES = ("provider", "owner", "enclave", "model", "data", "nonce")
_NUMBERS = (
    ("max_new_tokens", 1, 65_536),
    ("max_queries", 0, MAX_QUERIES),
    ("created", 0, 1 << 53),
    ("expires", 1, 1 << 53),
)


def _check_workers(workers: tuple[Worker, ...], profile: Profile) -> None:
    """Refuse workers that the profile cannot have: none in an enclave alone, of a sharing each of another operator."""
    if not profile.remote and workers:
        raise FormatError("workers of a job that has none", got=len(workers), expected=f"none for {profile.name}")
    if not profile.shares or not profile.remote:
        return
    if len(workers) != profile.share_workers:
        what = "workers of a job with secret shares"
        raise FormatError(what, got=len(workers), expected=f"{profile.share_workers} for {profile.name}")
    if len(operators_of(workers)) != len(workers):
        hint = "two shares at one operator may be all that is shared"
        raise FormatError("workers of a job with secret shares have one operator", expected="one each", hint=hint)


@dataclass(frozen=True)
class SignedJob:
    """A job with the signatures it has so far, each verified when it was read."""

    job: Job
    signatures: tuple[tuple[PublicIdentity, bytes], ...] = ()

    def sign(self, identity: Identity) -> "SignedJob":
        """Return the job with this party's signature added.

        Raises:
            ConsentError: the identity is no party of the job.
        """
        public = identity.public
        if self.job.role_of(public.fingerprint) is None:
            raise ConsentError("not a party of this job", got=f"{public.name} {public.fingerprint[:16]}")
        signature = identity.sign(_CONTEXT, encode(self.job.to_dict()))
        others = tuple(pair for pair in self.signatures if pair[0] != public)
        pairs = sorted((*others, (public, signature)), key=lambda pair: pair[0].fingerprint)
        return replace(self, signatures=tuple(pairs))

    def party(self, role: Role) -> PublicIdentity | None:
        """Return the identity that signed in a role."""
        fingerprint = getattr(self.job, role)
        return next((public for public, _ in self.signatures if public.fingerprint == fingerprint), None)

    def missing(self) -> list[Role]:
        """Return the roles whose signature is missing."""
        return [role for role in ROLES if self.party(role) is None]

    def to_bytes(self) -> bytes:
        """Return the file's content."""
        pairs = [
            {"identity": public.to_dict(), "signature": base64.b64encode(signature).decode()}
            for public, signature in self.signatures
        ]
        return encode({"job": self.job.to_dict(), "signatures": pairs})

    @classmethod
    def from_bytes(cls, data: bytes, what: str = "job file") -> "SignedJob":
        """Return the job of a file's content.

        Raises:
            FormatError: not a job file. ConsentError: a signature that is not of this job, or of no party of it.
        """
        fields = decode(data.rstrip(b"\n"), what, max_bytes=MAX_JOB_BYTES)
        if set(fields) != {"job", "signatures"} or not isinstance(fields["signatures"], list):
            raise FormatError(f"{what} is no job", expected="a job and its signatures")
        job = Job.from_dict(fields["job"])
        message = encode(fields["job"])
        if len(fields["signatures"]) > len(ROLES):
            raise FormatError(f"{what} has too many signatures", expected=f"at most {len(ROLES)}")
        pairs = [_signature(entry, job, message) for entry in fields["signatures"]]
        signers = [public.fingerprint for public, _ in pairs]
        if signers != sorted(set(signers)):
            raise FormatError(f"{what} has two signatures of one party, or not in the order of fingerprints")
        return cls(job, tuple(pairs))

    @classmethod
    def load(cls, path: Path) -> "SignedJob":
        """Read a job file; raises as :meth:`from_bytes`, and UsageError where it cannot be read."""
        return cls.from_bytes(read_small(path, MAX_JOB_BYTES, "job file"), f"job file {path}")


def _signature(entry: Any, job: Job, message: bytes) -> tuple[PublicIdentity, bytes]:
    if not isinstance(entry, dict) or set(entry) != {"identity", "signature"}:
        raise FormatError("a signature of a wrong form")
    public = PublicIdentity.from_dict(entry["identity"], "identity of a signature")
    try:
        signature = base64.b64decode(entry["signature"], validate=True)
    except (ValueError, TypeError):
        signature = b""
    # Decoders ignore the unused bits of the last digit: without the comparison, one signature has several spellings.
    if len(signature) != 64 or base64.b64encode(signature).decode() != entry["signature"]:
        raise FormatError("a signature that is not the base64 of 64 bytes")
    if job.role_of(public.fingerprint) is None:
        raise ConsentError("signed by somebody who is no party of the job", got=f"{public.name}")
    if not public.verify(signature, _CONTEXT, message):
        hint = "an option was changed after it was signed: make a new job, and let both sign it"
        raise ConsentError("signature does not fit the job", got=f"of {public.name}", hint=hint)
    return public, signature
