"""What a sharing claims and what it does not, in the words of reports and warnings; and what it cost."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from obfuscatune.enclave.sharing.scheme import Scheme
from obfuscatune.enclave.sharing.workers import Seconds, Workers

CLAIM = (
    "Each operator alone sees uniformly random numbers. This is proved, if the generator of random numbers is sound.",
    "Any two together can recover weights and data completely, even later from recordings, and nobody would notice.",
    "So the operators must be different companies, with different accounts, administrators and parent companies.",
    "Sizes, timing and which layer is called are visible. Wrong answers are detected; leaks are not.",
    "If you have a confidential GPU that you trust, using it is cheaper: it costs 4-8 % (arXiv 2509.18886).",
)
_ENDS = (
    ("Any two together", "Any {count} together"),
    ("Each operator alone sees", "Any {threshold} operators together see"),
)
_OPEN = "The weights are in the clear on every worker: only activations and gradients are shared."
ONE_MACHINE = (
    "workers on one machine protect nothing: whoever has the machine has all shares, and with them weights and data. "
    "For tests and demonstrations only; give each operator's worker its address"
)
UNPROTECTED_LINK = (
    "a link to a worker is not encrypted: whoever reads the links to two workers has weights and data. "
    "Use tls:// addresses with the workers' fingerprints"
)


@dataclass(frozen=True, slots=True)
class Sharing:
    """How a model is shared, for its report.

    Attributes:
        workers, needed, threshold, primes: of the scheme. open_weights: whether the weights are in the clear there.
        relative_error: typical error of a product, relative to the norms of row and column.
        same_machine: whether workers share one, as far as their addresses tell. links_in_the_clear: whether some do not
            encrypt. seconds: of the enclave. busy: of each worker with its products, as it says.
    """

    workers: int
    needed: int
    threshold: int
    primes: tuple[int, ...]
    open_weights: bool
    relative_error: float
    same_machine: bool
    links_in_the_clear: bool
    seconds: Seconds
    busy: tuple[float, ...]

    def lines(self) -> list[str]:
        """Return what a report says of it."""
        s = self.seconds
        lines = [
            f"sharing     {self.workers} workers, any {self.needed} give a product, {self.threshold} may collude; "
            f"{len(self.primes)} primes: relative error {self.relative_error:.0e}",
            f"enclave     {s.encode + s.decode:.2f} s of its own (shares {s.encode:.2f}, results {s.decode:.2f}), "
            f"{s.send:.2f} s sending, {s.wait:.2f} s waiting",
        ]
        if self.busy:
            each = ", ".join(f"{seconds:.2f}" for seconds in self.busy)
            lines.append(
                f"workers     {each} s of products; the slowest {max(self.busy):.2f}, as on machines of their own; "
                f"all {sum(self.busy):.2f}, as on one"
            )
        lines += claim(self.threshold)
        if self.open_weights:
            lines.append(_OPEN)
        lines += [f"WARNING: {text}." for text in self.warnings()]
        return lines

    def warnings(self) -> list[str]:
        """Return what makes the claim void here."""
        found = [f"{self.workers} {ONE_MACHINE}"] if self.same_machine else []
        return found + ([UNPROTECTED_LINK] if self.links_in_the_clear else [])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return dataclasses.asdict(self)


def claim(threshold: int) -> list[str]:
    """What a sharing with this threshold claims, in lines."""
    if threshold == 1:
        return list(CLAIM)
    lines = []
    for line in CLAIM:
        for old, new in _ENDS:
            line = line.replace(old, new.format(count=threshold + 1, threshold=threshold))
        lines.append(line)
    return lines


def describe(workers: Workers, addresses: Sequence[str], busy: Sequence[float] = ()) -> Sharing:
    """Return the statement for these workers, at these addresses (``"spawn"`` for one of our own)."""
    scheme: Scheme = workers.scheme
    hosts = [_host(address) for address in addresses]
    return Sharing(
        workers=len(scheme.points),
        needed=scheme.needed,
        threshold=scheme.threshold,
        primes=scheme.primes,
        open_weights=not scheme.shares_weights,
        relative_error=workers.largest_error,
        same_machine=len(set(hosts)) < len(hosts),
        links_in_the_clear=any(address.startswith("tcp://") for address in addresses),
        seconds=dataclasses.replace(workers.seconds),
        busy=tuple(busy),
    )


def _host(address: str) -> str:
    """The machine of an address, as far as that tells; this one's own is ``""``."""
    if address == "spawn" or address.startswith("unix://"):
        return ""
    host = urlsplit(address).hostname or address
    return "" if host == "localhost" or host == "::1" or host.startswith("127.") else host
