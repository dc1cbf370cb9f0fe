"""What jobs and terms both speak of: roles, digests, names of profiles, and how many queries there may be."""

import re
from typing import Any, Literal

from obfuscatune.errors import FormatError, UsageError
from obfuscatune.profiles import SWITCHES, resolve

Role = Literal["provider", "owner"]
ROLES: tuple[Role, ...] = ("provider", "owner")
MAX_QUERIES = 1_000_000
_DIGEST = re.compile(r"[0-9a-f]{64}")


def is_digest(value: Any) -> bool:
    """Return whether ``value`` is a digest or a fingerprint as text: 64 hex digits, in small letters."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def profile_name(profile: Any, switches: Any) -> str:
    """Return the name of the profile with these switches, as terms list it; raises FormatError for an unknown one."""
    if not isinstance(profile, str) or not isinstance(switches, dict):
        raise FormatError("profile or switches of a wrong type")
    if not set(switches) <= set(SWITCHES):
        raise FormatError("unknown switch of a profile", expected=f"some of {', '.join(SWITCHES)}")
    try:
        resolved = resolve(profile, **switches)
    except UsageError as error:
        raise FormatError(f"profile of the job: {error.what}", got=error.got, expected=error.expected) from None
    if resolved.shares:
        # Its claim rests on who runs the workers. The operator names them, and the owners could not object.
        what = "profile of the job: secret shares, whose workers' operators no terms can name yet"
        raise FormatError(what, got=resolved.name)
    return resolved.name
