"""HOST:PORT of an address: names, IPv4, and IPv6 in brackets; nothing of torch, so that a client starts at once."""

import re

from obfuscatune.errors import UsageError

_FORM = re.compile(r"(?:\[([0-9A-Za-z:.%]+)\]|([0-9A-Za-z._-]+)):([0-9]{1,5})")


def parse_host_port(rest: str, where: str) -> tuple[str, int] | None:
    """Return host and port of ``rest``, or None where it has another form; ``where`` is the whole address.

    Raises:
        UsageError: a port above 65535.
    """
    match = _FORM.fullmatch(rest)
    if match is None:
        return None
    port = int(match[3])
    if port > 65535:
        raise UsageError("port out of range", got=port, expected="0 to 65535", where=where)
    return match[1] or match[2], port


def format_host_port(host: str, port: int) -> str:
    """Return what `parse_host_port` reads back."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
