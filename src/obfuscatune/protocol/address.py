"""Where a worker listens: ``unix://PATH``, ``tcp://HOST:PORT``, or ``tls://HOST:PORT#FINGERPRINT``."""

import contextlib
import errno
import ipaddress
import os
import re
import socket
import stat
from dataclasses import dataclass

from obfuscatune.errors import UsageError
from obfuscatune.protocol.hostport import BACKLOG, format_host_port, listen_fault, listen_tcp, parse_host_port

_FORMS = "unix://PATH, tcp://HOST:PORT or tls://HOST:PORT#FINGERPRINT"
_MAX_UNIX_PATH_BYTES = 107  # sun_path of Linux without its final zero
_FINGERPRINT = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Address:
    """A parsed address: a unix ``path``, or a ``host`` and ``port`` where ``path`` is empty.

    Port 0 is for listening only: the system picks one, which `address_of` tells.

    Attributes:
        tls: whether the link is encrypted and both ends are known. fingerprint: of the worker's identity, 64 hex
            digits; needed to connect, empty where a worker is told to listen.
    """

    path: str = ""
    host: str = ""
    port: int = 0
    tls: bool = False
    fingerprint: str = ""

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Parse ``unix://PATH``, ``tcp://HOST:PORT`` or ``tls://HOST:PORT[#FINGERPRINT]`` (IPv6 hosts in brackets).

        Raises:
            UsageError: another form, a port above 65535, or a path that AF_UNIX cannot hold.
        """
        scheme, separator, rest = text.partition("://")
        if scheme == "unix" and separator and rest and "\0" not in rest:
            length = len(os.fsencode(rest))
            if length > _MAX_UNIX_PATH_BYTES:
                raise UsageError(
                    "path of a unix socket is too long",
                    got=f"{length} bytes",
                    expected=f"at most {_MAX_UNIX_PATH_BYTES} bytes",
                    where=text,
                    hint="use a shorter one, for instance under /tmp, or a relative path",
                )
            return cls(path=rest)
        tls = scheme == "tls"
        rest, mark, fingerprint = rest.partition("#") if tls else (rest, "", "")
        parsed = parse_host_port(rest, text) if scheme in ("tcp", "tls") and separator else None
        if parsed is None:
            hint = "for instance tcp://127.0.0.1:7000, or with IPv6 tcp://[::1]:7000"
            raise UsageError("not an address", got=repr(text), expected=_FORMS, hint=hint)
        if mark and not _FINGERPRINT.fullmatch(fingerprint):
            hint = "the worker prints its whole address when it starts; or: obfuscatune identity show NAME.pub"
            raise UsageError("not a fingerprint", got=repr(fingerprint), expected="64 digits of 0-9a-f", hint=hint)
        return cls(host=parsed[0], port=parsed[1], tls=tls, fingerprint=fingerprint)

    @classmethod
    def of_worker(cls, text: str, insecure: bool, flag: str) -> "Address":
        """Parse the address that an enclave is to connect to.

        Raises:
            UsageError: as `parse` and `check_exposure`, or ``tls://`` without the worker's fingerprint.
        """
        address = cls.parse(text)
        address.check_exposure(insecure, flag)
        if address.tls and not address.fingerprint:
            hint = "the worker prints its whole address when it starts; or: obfuscatune identity show NAME.pub"
            raise UsageError("no fingerprint of the worker", got=text, expected=f"{text}#FINGERPRINT", hint=hint)
        return address

    def __str__(self) -> str:
        if self.path:
            return f"unix://{self.path}"
        mark = f"#{self.fingerprint}" if self.fingerprint else ""
        return f"{'tls' if self.tls else 'tcp'}://{format_host_port(self.host, self.port)}{mark}"

    @property
    def is_local(self) -> bool:
        """Whether no other machine can be meant: a unix socket, or loopback."""
        if self.path or self.host == "localhost":
            return True
        try:
            host = ipaddress.ip_address(self.host.partition("%")[0])
        except ValueError:
            return False  # a name may be anybody's
        mapped = getattr(host, "ipv4_mapped", None)
        return host.is_loopback if mapped is None else mapped.is_loopback

    def check_exposure(self, insecure: bool, flag: str) -> None:
        """Refuse TCP without TLS to another machine, unless ``flag`` names it; raises UsageError."""
        if not (self.is_local or self.tls or insecure):
            raise UsageError(
                "tcp:// beyond this machine is neither encrypted nor authenticated",
                got=str(self),
                expected=f"tls://, or {flag} where nobody else can reach the link",
                hint="who listens on the path reads keyed weights and activations, LoRA factors and all sizes; who "
                "stands in it can change results. docs/deployment.md shows how to set up tls://",
            )


def address_of(listener: socket.socket) -> Address:
    """The address a listener got, with the port that the system picked where 0 was asked for."""
    name = listener.getsockname()
    return Address(path=name) if listener.family == socket.AF_UNIX else Address(host=name[0], port=name[1])


def connect(address: Address, timeout: float) -> socket.socket:
    """Connect once, within ``timeout`` seconds; the socket returned is blocking.

    Raises:
        UsageError: no worker answers at the address.
    """
    try:
        if not address.path:
            sock = socket.create_connection((address.host, address.port), timeout=timeout)
        else:
            sock = _connect_unix(address.path, timeout)
    except OSError as error:
        raise UsageError(
            "no worker answers",
            got=error.strerror or "timeout",
            where=str(address),
            hint=f"start one with: obfuscatune worker --listen {address}",
        ) from None
    sock.settimeout(None)
    return sock


def listen(address: Address) -> socket.socket:
    """Listen at the address. A unix socket is made with mode 0600; one that a dead process left behind is replaced.

    Raises:
        UsageError: the address is in use, or cannot be listened at.
    """
    try:
        return _listen_unix(address.path) if address.path else listen_tcp(address.host, address.port)
    except OSError as error:
        raise listen_fault(error, str(address)) from None


def close_listener(listener: socket.socket, address: Address) -> None:
    """Stop listening and remove the socket file that `listen` made; again and again does no harm."""
    if address.path and listener.fileno() >= 0:
        # Before the close: while this listens no other worker replaces the file, so the one removed is ours.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(address.path)
    listener.close()


def _connect_unix(path: str, timeout: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return sock


def _listen_unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Linux gives the file the mode of the socket itself, so it never exists with a wider one, whatever the umask.
        os.fchmod(sock.fileno(), 0o600)
        try:
            sock.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _is_stale(path):
                raise
            os.unlink(path)
            sock.bind(path)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _is_stale(path: str) -> bool:
    """Whether the path is a socket that nobody listens at; an ordinary file never is, so it is never removed."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return False
    try:
        _connect_unix(path, timeout=1.0).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False
