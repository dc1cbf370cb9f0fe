"""What is where, what crossed the boundary, and what it cost: counted, not estimated."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from obfuscatune.enclave.links import Link
from obfuscatune.enclave.session import Session
from obfuscatune.enclave.sharing.statement import Sharing, describe
from obfuscatune.enclave.sharing.workers import Workers
from obfuscatune.enclave.traffic import Traffic
from obfuscatune.errors import UsageError, WorkerFault
from obfuscatune.profiles import Profile
from obfuscatune.protocol.memory import peak_memory_bytes


@dataclass(frozen=True, slots=True)
class WorkerPart:
    """One worker's part.

    Attributes:
        name: its address, or its process. blocks, parameters: what it has of the model, keyed.
        traffic: by operation; the seconds are those that the enclave waited for this worker.
        peak_bytes, busy_seconds: of its memory, and with products of shares, as it says; None where it says nothing.
    """

    name: str
    blocks: int
    parameters: int
    traffic: dict[str, Traffic]
    peak_bytes: int | None
    busy_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """Counts of one protected model: bytes with their framing, seconds spent waiting for replies."""

    profile: Profile
    enclave_parameters: int
    total_parameters: int
    workers: list[WorkerPart]
    enclave_peak_bytes: int
    sharing: Sharing | None = None

    @property
    def worker(self) -> str:
        """The workers' names."""
        return ", ".join(part.name for part in self.workers) or "no worker"

    @property
    def worker_parameters(self) -> int:
        """Parameters on all workers; each has a share of every one, where they are shared."""
        counts = [part.parameters for part in self.workers]
        return max(counts, default=0) if self.sharing is not None else sum(counts)

    @property
    def worker_peak_bytes(self) -> int | None:
        """The largest peak that a worker tells of."""
        return max((part.peak_bytes for part in self.workers if part.peak_bytes), default=None)

    @property
    def traffic(self) -> dict[str, Traffic]:
        """Counts by operation, of all workers together."""
        total: dict[str, Traffic] = {}
        for part in self.workers:
            for op, counts in part.traffic.items():
                total[op] = total.get(op, Traffic()) + counts
        return total

    @property
    def enclave_share(self) -> float:
        """Share of the model's parameters that are in the enclave in the clear."""
        return self.enclave_parameters / max(1, self.total_parameters)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and strings, for JSON."""
        fields = dataclasses.asdict(self)
        del fields["profile"]["chosen"]  # the profile says what was done
        return {
            **fields,
            "worker": self.worker,
            "worker_parameters": self.worker_parameters,
            "worker_peak_bytes": self.worker_peak_bytes,
            "traffic": {op: dataclasses.asdict(counts) for op, counts in self.traffic.items()},
            "enclave_share": self.enclave_share,
        }

    def __str__(self) -> str:
        share = f"{100 * self.enclave_share:.1f} % of {self.total_parameters:,}"
        what = "as secret shares" if self.sharing is not None and not self.sharing.open_weights else "under its keys"
        if self.sharing is not None and self.sharing.open_weights:
            what = "in the clear"
        lines = [
            f"profile {self.profile.name}: {self.profile.summary}",
            f"parameters  {self.enclave_parameters:>14,} in the enclave in the clear ({share})",
            f"            {self.worker_parameters:>14,} on the worker, {what} ({self.worker})",
        ]
        if self.sharing is not None:
            lines += self.sharing.lines()
        if len(self.workers) > 1:
            lines.append(f"{'worker':<40}{'blocks':>8}{'parameters':>14}{'MB':>10}{'s waiting':>12}")
            lines += [_line(part) for part in self.workers]
        if self.traffic:
            lines.append(f"{'requests':<12}{'calls':>10}{'MB sent':>12}{'MB received':>13}{'s waiting':>12}")
        for op, t in self.traffic.items():
            lines.append(
                f"{op:<12}{t.calls:>10,}{t.bytes_sent / 1e6:>12.2f}{t.bytes_received / 1e6:>13.2f}{t.seconds:>12.2f}"
            )
        worker = f", worker {self.worker_peak_bytes / 2**20:,.0f} MiB" if self.worker_peak_bytes else ""
        lines.append(f"peak memory enclave {self.enclave_peak_bytes / 2**20:,.0f} MiB{worker}")
        return "\n".join(lines)


def _line(part: WorkerPart) -> str:
    counts = list(part.traffic.values())
    moved = sum(t.bytes_sent + t.bytes_received for t in counts) / 1e6
    waited = sum(t.seconds for t in counts)
    return f"{part.name[:39]:<40}{part.blocks:>8,}{part.parameters:>14,}{moved:>10,.1f}{waited:>12.2f}"


def make_report(
    profile: Profile, links: Sequence[Link], *, total: int, sharing: tuple[Workers, list[str]] | None = None
) -> Report:
    """Collect the counts; asks each worker for its own memory, if it still answers.

    Args:
        total: parameters of the whole model. What did not leave is in the enclave: the model itself cannot be counted
            now, as the biases of remote layers are its buffers. sharing: the workers that have shares, and their
            addresses.
    """
    told = [_told(link.session) for link in links]
    gone = [link.parameters for link in links]
    busy = [value for _, value in told if value is not None]
    return Report(
        profile=profile,
        enclave_parameters=total - (sum(gone) if sharing is None else max(gone)),
        total_parameters=total,
        workers=[
            WorkerPart(
                name=link.session.worker,
                blocks=len(link.blocks),
                parameters=link.parameters,
                peak_bytes=peak,
                busy_seconds=seconds,
                traffic={op: dataclasses.replace(t) for op, t in link.session.traffic.items()},
            )
            for link, (peak, seconds) in zip(links, told, strict=True)
        ],
        enclave_peak_bytes=peak_memory_bytes(),
        sharing=None if sharing is None else describe(*sharing, busy),
    )


def _told(session: Session) -> tuple[int | None, float | None]:
    """Peak memory and seconds of products, as a worker says."""
    try:
        reply = session.request("stats", "-", {}, {}, {})[0]
    except (UsageError, WorkerFault):
        return None, None
    peak, busy = reply.get("peak_memory_bytes"), reply.get("busy_seconds")
    return (
        peak if isinstance(peak, int) and peak > 0 else None,
        busy if isinstance(busy, float) and busy >= 0 else None,
    )
