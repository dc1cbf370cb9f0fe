"""What jobs and terms both speak of: roles, digests, names of profiles, workers, and how many queries there may be."""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from obfuscatune.errors import FormatError, UsageError
from obfuscatune.profiles import SWITCHES, Profile, resolve

Role = Literal["provider", "owner"]
ROLES: tuple[Role, ...] = ("provider", "owner")
MAX_QUERIES = 1_000_000
TURN_SECONDS = 10.0  # that queries of other jobs get at most between two steps of one that runs
MAX_WORKERS = 16
TOO_MANY = "too many queries at a time"  # what a party is told that has as many in the enclave as it may
TURNS = (
    f"other jobs' models may be asked between two steps: for as long as the job has had since, at most "
    f"{TURN_SECONDS:g} s and a token; loading one counts, and one load may go beyond"
)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_OPERATOR = 64  # characters


@dataclass(frozen=True, order=True)
class Worker:
    """A worker by the fingerprint of its identity (64 hex digits), and who operates it, as the owners call them."""

    fingerprint: str
    operator: str

    def to_dict(self) -> dict[str, str]:
        """Return the canonical fields."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Any) -> "Worker":
        """Return the worker of ``fields``; raises FormatError for other fields, no fingerprint, or no usable name."""
        if not isinstance(fields, dict) or set(fields) != {"fingerprint", "operator"}:
            raise FormatError("a worker with other fields", expected="fingerprint and operator")
        if not is_digest(fields["fingerprint"]):
            raise FormatError("a worker's fingerprint is not 64 hex digits")
        operator = fields["operator"]
        named = isinstance(operator, str) and operator.isprintable() and operator == operator.strip()
        if not named or not 1 <= len(operator) <= _MAX_OPERATOR:
            expected = f"1 to {_MAX_OPERATOR} printable characters, none of them a space at an end"
            raise FormatError("a worker's operator has no usable name", expected=expected)
        return cls(fields["fingerprint"], operator)


def workers_from(value: Any, what: str) -> tuple[Worker, ...]:
    """Return the workers of a list of fields, each once; raises FormatError, in which ``what`` names the list."""
    if not isinstance(value, list | tuple) or len(value) > MAX_WORKERS:
        raise FormatError(f"{what} is not a list of at most {MAX_WORKERS} workers")
    found = tuple(each if isinstance(each, Worker) else Worker.from_dict(each) for each in value)
    if len({worker.fingerprint for worker in found}) != len(found):
        raise FormatError(f"{what} names a worker twice")
    return found


def operators_of(workers: Iterable[Worker]) -> set[str]:
    """Return the different operators of workers: one that is spelled in two ways is one, and so has two shares."""
    return {" ".join(unicodedata.normalize("NFKC", worker.operator).casefold().split()) for worker in workers}


def is_digest(value: Any) -> bool:
    """Return whether ``value`` is a digest or a fingerprint as text: 64 hex digits, in small letters."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def profile_of(profile: Any, switches: Any) -> Profile:
    """Return the profile with these switches; raises FormatError for an unknown one."""
    if not isinstance(profile, str) or not isinstance(switches, dict):
        raise FormatError("profile or switches of a wrong type")
    if not set(switches) <= set(SWITCHES):
        raise FormatError("unknown switch of a profile", expected=f"some of {', '.join(SWITCHES)}")
    try:
        return resolve(profile, **switches)
    except UsageError as error:
        raise FormatError(f"profile of the job: {error.what}", got=error.got, expected=error.expected) from None


def profile_name(profile: Any, switches: Any) -> str:
    """Return the name of the profile with these switches, as terms list it; raises as :func:`profile_of`."""
    return profile_of(profile, switches).name


def profile_named(name: Any) -> Profile:
    """Return the profile of a name as terms list it, switches and all (``balanced+mlp=enclave``).

    Raises:
        FormatError: another spelling than the one that the profile's own name has.
    """
    if not isinstance(name, str):
        raise FormatError("name of a profile of a wrong type")
    base, *switches = name.split("+")
    try:
        given = dict(switch.split("=", 1) for switch in switches)
        found = profile_of(base, {key: _plain(text) for key, text in given.items()})
    except ValueError:  # FormatError is one
        raise FormatError("unknown name of a profile") from None
    if found.name != name:
        raise FormatError("unknown name of a profile")
    return found


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
