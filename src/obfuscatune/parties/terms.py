"""Terms: what the owner of a model or of data allows to be done with it, sealed and signed together with it.

They travel in the header of the sealed file, so the enclave reads them from the owner and from nobody else, and refuses
a job that goes beyond them even if both parties have signed it. Written as TOML:

    profiles = ["balanced", "enclave"]   # what the worker may be shown: exact names of profiles, with their switches
    adapter_to = ["provider"]            # who may get the trained adapter
    generations_to = ["owner"]           # who may get completions of the job's prompts
    queries_by = ["owner"]               # who may ask the running enclave for completions
    max_queries = 1000                   # prompts, in one job: those sealed with it and those asked later
    partners = ["<fingerprint>"]         # who the other party may be; without it: anybody whose job this owner signs
    expires = 2027-06-30                 # no job starts after this day (UTC)
"""

import datetime
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from obfuscatune.errors import FormatError
from obfuscatune.parties.identity import read_small
from obfuscatune.parties.job import Job
from obfuscatune.parties.vocabulary import MAX_QUERIES, ROLES, Role, is_digest, profile_name

# Without terms: what hands over nothing in plain coordinates. Who gets what is in the job, which the owner signs too.
DEFAULT_PROFILES = ("balanced", "enclave")
_NAMES = {"profiles", "adapter_to", "generations_to", "queries_by", "max_queries", "partners", "expires"}


@dataclass(frozen=True, kw_only=True)
class Terms:
    """One owner's conditions, as at the head of this module; ``expires`` in Unix seconds, 0 for never."""

    profiles: tuple[str, ...] = DEFAULT_PROFILES
    adapter_to: tuple[Role, ...] = ROLES
    generations_to: tuple[Role, ...] = ROLES
    queries_by: tuple[Role, ...] = ROLES
    max_queries: int = MAX_QUERIES
    partners: tuple[str, ...] = ()
    expires: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as the sealed header has them."""
        lists = ("profiles", "adapter_to", "generations_to", "queries_by", "partners")
        return {
            **{name: list(getattr(self, name)) for name in lists},
            "expires": self.expires,
            "max_queries": self.max_queries,
        }

    def faults(self, job: Job, role: Role, now: float) -> list[str]:
        """Return in what ``job`` goes beyond these terms of its ``role``, at ``now`` in Unix seconds."""
        partner = job.owner if role == "provider" else job.provider
        faults = []
        if job.profile_name not in self.profiles:
            faults.append(f"profile {job.profile_name} (allowed: {', '.join(self.profiles)})")
        for name in ("adapter_to", "generations_to", "queries_by"):
            if not set(getattr(job, name)) <= set(getattr(self, name)):
                faults.append(f"{name} {' and '.join(getattr(job, name))}")
        if job.max_queries > self.max_queries:
            faults.append(f"{job.max_queries} queries (allowed: {self.max_queries})")
        if self.partners and partner not in self.partners:
            faults.append(f"the partner {partner[:16]}")
        if self.expires and now > self.expires:
            faults.append("the date")
        return faults

    @classmethod
    def from_dict(cls, fields: dict[str, Any] | None, what: str = "terms") -> "Terms":
        """Return the terms of a sealed header; ``None`` are the defaults.

        Raises:
            FormatError: unknown names, wrong types, unknown profiles or roles; all in one message.
        """
        if fields is None:
            return cls()
        if not isinstance(fields, dict):
            raise FormatError(f"{what} are not a map", got=type(fields).__name__)
        faults = [f"unknown {name[:40]!r}" for name in sorted(set(fields) - _NAMES)]
        for name in ("adapter_to", "generations_to", "queries_by"):
            if name in fields:
                faults += [] if _are_roles(fields[name]) else [f"{name} is not a list of {' and '.join(ROLES)}"]
        for name, check, expected in (
            ("profiles", _is_profile, "names of profiles"),
            ("partners", is_digest, "fingerprints"),
        ):
            if name in fields and not (isinstance(fields[name], list) and all(map(check, fields[name]))):
                faults.append(f"{name} is not a list of {expected}")
        for name, greatest in (("max_queries", MAX_QUERIES), ("expires", 1 << 53)):
            if name in fields and (type(fields[name]) is not int or not 0 <= fields[name] <= greatest):
                faults.append(f"{name} is not a number from 0 to {greatest}")
        if faults:
            raise FormatError(f"{what} do not fit", got="; ".join(faults))
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
        return cls(**values)


def load_terms(path: Path) -> dict[str, Any]:
    """Read terms from a TOML file, checked, as the dictionary that a sealed header takes.

    Raises:
        UsageError: it cannot be read. FormatError: not TOML, or not terms.
    """
    data = read_small(path, 65_536, "terms")
    try:
        fields = tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits, too
        got = str(error) if isinstance(error, tomllib.TOMLDecodeError) else type(error).__name__
        raise FormatError("terms are not TOML", got=got, where=str(path)) from None
    day = fields.get("expires")
    if isinstance(day, datetime.date) and not isinstance(day, datetime.datetime):
        end = datetime.datetime.combine(day, datetime.time.max, datetime.UTC)
        fields["expires"] = int(end.timestamp())
    return Terms.from_dict(fields, f"terms in {path}").to_dict()


def _are_roles(value: Any) -> bool:
    return isinstance(value, list) and all(item in ROLES for item in value) and len(set(value)) == len(value)


def _is_profile(value: Any) -> bool:
    """Whether it is a name as ``resolve`` gives it, with the switches behind it: ``balanced+mlp=enclave``."""
    if not isinstance(value, str):
        return False
    name, *switches = value.split("+")
    try:
        given = dict(switch.split("=", 1) for switch in switches)
        return profile_name(name, {key: _plain(text) for key, text in given.items()}) == value
    except (FormatError, ValueError):
        return False


def _plain(text: str) -> Any:
    """The value of a switch as it stands in a profile's name."""
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
