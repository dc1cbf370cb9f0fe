"""Terms: what the owner of a model or of data allows to be done with it, sealed and signed together with it.

They travel in the header of the sealed file, so the enclave reads them from the owner and from nobody else, and refuses
a job that goes beyond them even if both parties have signed it. **What is left out is refused.** Written as TOML:

    version = 3
    profiles = ["enclave", "shared"]     # what a worker may be shown: exact names of profiles, with their switches
    adapter_to = ["provider"]            # who may get the trained adapter
    generations_to = ["owner"]           # who may get completions of the job's prompts
    queries_by = ["owner"]               # who may ask the running enclave for completions
    max_queries = 1000                   # prompts, in one job: those sealed with it and those asked later
    partners = ["<fingerprint>"]         # who the other party may be; or "any": anybody whose job this owner signs
    expires = 2027-06-30                 # no job starts after this day (UTC); or "never"
    max_jobs = 10                        # this and the next three are quotas: see `quotas`
    max_training_tokens = 10000000
    max_new_tokens = 512
    max_stored_bytes = 1073741824
    min_operators = 3                    # how many different operators the workers of secret shares have at least
    workers = "any"                      # whom the enclave's operator chooses; or, one table each:
    [[workers]]
    fingerprint = "<fingerprint>"
    operator = "who runs it"
    [shows]                              # of each profile that shows something, the line that says what
    balanced = "shows ..."

The template for an owner, whose own results are the only ones it gives, is `template`.
"""

import datetime
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from obfuscatune.errors import FormatError
from obfuscatune.parties.exposure import hides_all, line
from obfuscatune.parties.files import read_small
from obfuscatune.parties.job import Job
from obfuscatune.parties.quotas import QUOTAS
from obfuscatune.parties.quotas import faults as faults_of_quotas
from obfuscatune.parties.vocabulary import (
    MAX_QUERIES,
    MAX_WORKERS,
    ROLES,
    Role,
    Worker,
    is_digest,
    operators_of,
    profile_named,
    workers_from,
)
from obfuscatune.profiles import PROFILES

VERSION = 3
LEAST_OPERATORS = 3
_DAYS = 90  # of the template
_ROLES = ("adapter_to", "generations_to", "queries_by")
_NUMBERS = ("max_queries", *(quota.name for quota in QUOTAS), "min_operators")
_NAMES = {"version", "profiles", *_ROLES, *_NUMBERS, "partners", "expires", "workers", "shows"}


@dataclass(frozen=True, kw_only=True)
class Terms:
    """One owner's conditions, as at the head of this module; ``expires`` in Unix seconds, 0 where it is not given."""

    profiles: tuple[str, ...] = ()
    adapter_to: tuple[Role, ...] = ()
    generations_to: tuple[Role, ...] = ()
    queries_by: tuple[Role, ...] = ()
    max_queries: int = 0
    partners: tuple[str, ...] | Literal["any"] = ()
    expires: int | Literal["never"] = 0
    max_jobs: int = 0
    max_training_tokens: int = 0
    max_new_tokens: int = 0
    max_stored_bytes: int = 0
    workers: tuple[Worker, ...] | Literal["any"] = ()
    min_operators: int = LEAST_OPERATORS
    shows: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as the sealed header has them."""
        lists = ("profiles", *_ROLES)
        workers = self.workers if self.workers == "any" else [worker.to_dict() for worker in self.workers]
        return {
            "version": VERSION,
            **{name: list(getattr(self, name)) for name in lists},
            **{name: getattr(self, name) for name in _NUMBERS},
            "partners": self.partners if self.partners == "any" else list(self.partners),
            "expires": self.expires,
            "workers": workers,
            "shows": dict(self.shows),
        }

    def faults(self, job: Job, role: Role, now: float) -> list[str]:
        """Return in what ``job`` goes beyond these terms of its ``role``, at ``now`` in Unix seconds."""
        partner = job.owner if role == "provider" else job.provider
        faults = []
        if job.profile_name not in self.profiles:
            faults.append(f"profile {job.profile_name} (allowed: {', '.join(self.profiles) or 'none'})")
        for name in _ROLES:
            if not set(getattr(job, name)) <= set(getattr(self, name)):
                faults.append(f"{name} {' and '.join(getattr(job, name))}")
        if job.max_queries > self.max_queries:
            faults.append(f"{job.max_queries} queries (allowed: {self.max_queries})")
        if self.partners != "any" and partner not in self.partners:
            faults.append(f"the partner {partner[:16]}")
        if self.expires == 0:
            faults.append("any date: the terms give none")
        elif self.expires != "never" and now > self.expires:
            faults.append("the date: they have expired")
        faults += faults_of_quotas(self, job.settings, job.max_new_tokens)
        return faults + self._faults_of_workers(job)

    def _faults_of_workers(self, job: Job) -> list[str]:
        profile = job.resolved
        if not profile.remote:
            return []
        if profile.shares and self.workers == "any":  # its claim rests on who runs them
            return ["any workers: of secret shares the terms name each, with its operator"]
        faults = []
        if profile.shares and (count := len(operators_of(job.workers))) < self.min_operators:
            faults.append(f"workers of {count} operators (asked for: {self.min_operators})")
        if self.workers == "any":
            return faults
        if not job.workers:
            return [*faults, "workers that the job does not name"]
        named = {worker.fingerprint: worker for worker in self.workers}
        for worker in job.workers:
            known = named.get(worker.fingerprint)
            if known is None:
                faults.append(f"the worker {worker.fingerprint[:16]} of {worker.operator}")
            elif known != worker:
                faults.append(f"the worker {worker.fingerprint[:16]} as {worker.operator}'s: it is {known.operator}'s")
        return faults

    @classmethod
    def from_dict(cls, fields: dict[str, Any] | None, what: str = "terms") -> "Terms":
        """Return the terms of a sealed header.

        Raises:
            FormatError: none at all, another version, unknown names, wrong types, unknown profiles or roles, a profile
                without the line of what it shows; all faults in one message.
        """
        if fields is None:
            raise FormatError(f"no {what}: it was sealed without", hint="seal it again, with terms")
        if not isinstance(fields, dict):
            raise FormatError(f"{what} are not a map", got=type(fields).__name__)
        if fields.get("version") != VERSION or type(fields["version"]) is not int:
            hint = "earlier ones had no quotas: write what you give, then seal it again (obfuscatune seal terms)"
            got = fields.get("version") if type(fields.get("version")) is int else "none"
            raise FormatError(f"{what} are of another version", got=got, expected=f"version = {VERSION}", hint=hint)
        faults = [f"unknown {name[:40]!r}" for name in sorted(set(fields) - _NAMES)]
        for name in _ROLES:
            if name in fields:
                faults += [] if _are_roles(fields[name]) else [f"{name} is not a list of {' and '.join(ROLES)}"]
        partners = fields.get("partners", [])
        if partners != "any" and not (isinstance(partners, list) and all(map(is_digest, partners))):
            faults.append('partners is not a list of fingerprints, or "any"')
        bounds = [("max_queries", 0, MAX_QUERIES), ("min_operators", 2, MAX_WORKERS)]
        for name, least, greatest in [*bounds, *((quota.name, 0, quota.greatest) for quota in QUOTAS)]:
            if name in fields and (type(fields[name]) is not int or not least <= fields[name] <= greatest):
                faults.append(f"{name} is not a number from {least} to {greatest}")
        expires = fields.get("expires", 1)
        if expires != "never" and (type(expires) is not int or not 0 <= expires <= 1 << 53):
            faults.append('expires is not a time, or "never"')
        faults += _faults_of_profiles(fields.get("profiles", []), fields.get("shows", {}))
        workers: Any = fields.get("workers", [])
        if workers != "any":
            try:
                workers = workers_from(workers, "workers")
            except FormatError as error:
                faults.append(error.what)
        if faults:
            raise FormatError(f"{what} do not fit", got="; ".join(faults))
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
        return cls(**{name: v for name, v in values.items() if name != "version"} | {"workers": workers})


def load_terms(path: Path) -> dict[str, Any]:
    """Read terms from a TOML file, checked, as the dictionary that a sealed header takes.

    Raises:
        UsageError: it cannot be read. FormatError: not TOML, or not terms.
    """
    data = read_small(path, 65_536, "terms")
    try:
        fields = tomllib.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits, too
        got = str(error) if isinstance(error, tomllib.TOMLDecodeError) else type(error).__name__
        raise FormatError("terms are not TOML", got=got, where=str(path)) from None
    day = fields.get("expires")
    if isinstance(day, datetime.date) and not isinstance(day, datetime.datetime):
        end = datetime.datetime.combine(day, datetime.time.max, datetime.UTC)
        fields["expires"] = int(end.timestamp())
    return Terms.from_dict(fields, f"terms in {path}").to_dict()


def template(role: Role, partners: Sequence[str] = (), today: datetime.date | None = None) -> str:
    """Return terms to fill, in TOML: profiles that protect from any one worker, results for the data owner alone.

    Args:
        role: whose terms. partners: fingerprints of who the other party may be. today: by the clock, if not given.
    """
    until = (today or datetime.datetime.now(datetime.UTC).date()) + datetime.timedelta(days=_DAYS)
    weaker = [profile for profile in PROFILES.values() if not hides_all(profile)]
    listed = ", ".join(f'"{partner}"' for partner in partners)
    whose = "the model" if role == "provider" else "the data and the prompts"
    return "\n".join(
        [
            f"# Terms of {whose}: what an enclave may do with what is sealed with them.",
            "# What is not given here is refused, whatever anybody signs.",
            f"version = {VERSION}",
            'profiles = ["enclave", "shared"]  # by these no worker\'s operator alone learns anything of model or data',
            'adapter_to = ["owner"]',
            'generations_to = ["owner"]',
            'queries_by = ["owner"]',
            "max_queries = 100  # prompts in one job, those of the sealed file and those asked later",
            f'partners = [{listed}]  # fingerprints of who the other party may be; or "any" whose job you sign',
            f'expires = {until}  # no job starts after this day; or "never"',
            "# Quotas: how much of the enclave jobs may use; one that is left out refuses every job.",
            *[f"{quota.name} = {quota.template}  # {quota.what}" for quota in QUOTAS],
            "",
            f"min_operators = {LEAST_OPERATORS}  # of the workers of secret shares",
            "",
            "# The workers whom you trust not to collude, for the profile shared: one table each.",
            "# [[workers]]",
            '# fingerprint = "64 hex digits: obfuscatune identity show NAME.pub"',
            '# operator = "the company that runs it"',
            "",
            "# A profile that shows a worker something is allowed by its name in `profiles` together with its line",
            '# here; its workers are those above, or with workers = "any" whom the operator of the enclave takes.',
            "# [shows]",
            *[f'# {profile.name} = "{line(profile)}"' for profile in weaker],
            "",
        ]
    )


def _faults_of_profiles(profiles: Any, shows: Any) -> list[str]:
    if not isinstance(shows, dict) or not all(type(text) is str for pair in shows.items() for text in pair):
        return ["shows is not a table of lines"]
    if not isinstance(profiles, list):
        return ["profiles is not a list of names of profiles"]
    faults = []
    for name in profiles:
        try:
            needed = line(profile_named(name))
        except FormatError:
            return ["profiles is not a list of names of profiles"]
        if needed and shows.get(name) != needed:
            faults.append(f'{name} needs its line in [shows]: "{name}" = "{needed}"')
    others = [name[:40] for name in sorted(set(shows) - set(profiles))]
    return faults + ([f"shows speaks of profiles that are not allowed: {', '.join(others)}"] if others else [])


def _are_roles(value: Any) -> bool:
    return isinstance(value, list) and all(item in ROLES for item in value) and len(set(value)) == len(value)
