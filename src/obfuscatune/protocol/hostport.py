"""HOST:PORT of an address, and listening there: names, IPv4, and IPv6 in brackets; without torch, to load at once."""

import errno
import ipaddress
import re
import socket

from obfuscatune.errors import UsageError

BACKLOG = 64
_IPV6_NETWORK = 64  # bits: what one customer of a provider has at the least
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


def listen_tcp(host: str, port: int, backlog: int = BACKLOG) -> socket.socket:
    """Listen at the first address of ``host``; raises OSError, which `listen_fault` tells in words."""
    family, _, _, _, name = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(name[:2], family=family, backlog=backlog)


def listen_fault(error: OSError, where: str) -> UsageError:
    """Return what to raise where nobody can listen at the address ``where``."""
    if error.errno == errno.EADDRINUSE:
        hint = "stop what listens there, or choose another address"
        return UsageError("address is in use", where=where, hint=hint)
    return UsageError("cannot listen", got=error.strerror, where=where)


def source_of(host: str) -> str:
    """Return who counts as one source: an IPv4 address, or the /64 of an IPv6 one."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, _IPV6_NETWORK), strict=False))
    return str(address)
