"""Where an enclave listens: ``tls://HOST:PORT``."""

import socket
from dataclasses import dataclass

from obfuscatune.errors import UsageError
from obfuscatune.protocol.hostport import BACKLOG, format_host_port, listen_fault, listen_tcp, parse_host_port


@dataclass(frozen=True)
class TlsAddress:
    """A parsed address. Port 0 is for listening only: the system picks one."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "TlsAddress":
        """Parse ``tls://HOST:PORT`` (IPv6 hosts in brackets); raises UsageError on anything else."""
        scheme, _, rest = text.partition("://")
        parsed = parse_host_port(rest, text) if scheme == "tls" else None
        if parsed is None:
            hint = "for instance tls://127.0.0.1:7100, or with IPv6 tls://[::1]:7100"
            raise UsageError("not an address of an enclave", got=repr(text), expected="tls://HOST:PORT", hint=hint)
        return cls(*parsed)

    def __str__(self) -> str:
        return f"tls://{format_host_port(self.host, self.port)}"

    def connect(self, timeout: float) -> socket.socket:
        """Connect once, within ``timeout`` seconds; raises UsageError where nobody answers."""
        try:
            return socket.create_connection((self.host, self.port), timeout=timeout)
        except OSError as error:
            hint = "is `obfuscatune enclave serve` running there, and is the port open"
            got = error.strerror or "timeout"
            raise UsageError("no enclave answers", got=got, where=str(self), hint=hint) from None

    def listen(self, backlog: int = BACKLOG) -> socket.socket:
        """Listen at the address; raises UsageError where that cannot be."""
        try:
            return listen_tcp(self.host, self.port, backlog)
        except OSError as error:
            raise listen_fault(error, str(self)) from None

    def require_free(self) -> None:
        """Raise UsageError where one could not listen at the address now. Nobody can connect meanwhile."""
        try:
            family, _, _, _, name = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, socket.SOCK_STREAM) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as a listener has it
                trial.bind(name[:2])
        except OSError as error:
            raise listen_fault(error, str(self)) from None
