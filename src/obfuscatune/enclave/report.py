"""What is where, what crossed the boundary, and what it cost: counted, not estimated."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from obfuscatune.enclave.links import Link
from obfuscatune.enclave.session import Session, Traffic
from obfuscatune.errors import UsageError, WorkerFault
from obfuscatune.profiles import Profile
from obfuscatune.protocol.memory import peak_memory_bytes


@dataclass(frozen=True, slots=True)
class WorkerPart:
    """One worker's part.

    Attributes:
        name: its address, or its process. blocks, parameters: what it has of the model, keyed.
        traffic: by operation; the seconds are those that the enclave waited for this worker.
        peak_bytes: of its memory, as it says; None where it says nothing.
    """

    name: str
    blocks: int
    parameters: int
    traffic: dict[str, Traffic]
    peak_bytes: int | None


@dataclass(frozen=True, slots=True)
class Report:
    """Counts of one protected model: bytes with their framing, seconds spent waiting for replies."""

    profile: Profile
    enclave_parameters: int
    total_parameters: int
    workers: list[WorkerPart]
    enclave_peak_bytes: int

    @property
    def worker(self) -> str:
        """The workers' names."""
        return ", ".join(part.name for part in self.workers) or "no worker"

    @property
    def worker_parameters(self) -> int:
        """Parameters on all workers."""
        return sum(part.parameters for part in self.workers)

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
        return {
            **dataclasses.asdict(self),
            "worker": self.worker,
            "worker_parameters": self.worker_parameters,
            "worker_peak_bytes": self.worker_peak_bytes,
            "traffic": {op: dataclasses.asdict(counts) for op, counts in self.traffic.items()},
            "enclave_share": self.enclave_share,
        }

    def __str__(self) -> str:
        share = f"{100 * self.enclave_share:.1f} % of {self.total_parameters:,}"
        lines = [
            f"profile {self.profile.name}: {self.profile.summary}",
            f"parameters  {self.enclave_parameters:>14,} in the enclave in the clear ({share})",
            f"            {self.worker_parameters:>14,} on the worker, under this profile's keys ({self.worker})",
        ]
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


def make_report(profile: Profile, links: Sequence[Link], *, total: int) -> Report:
    """Collect the counts; asks each worker for its own memory, if it still answers.

    Args:
        total: parameters of the whole model. What did not leave is in the enclave: the model itself cannot be counted
            now, as the biases of remote layers are its buffers.
    """
    return Report(
        profile=profile,
        enclave_parameters=total - sum(link.parameters for link in links),
        total_parameters=total,
        workers=[
            WorkerPart(
                name=link.session.worker,
                blocks=len(link.blocks),
                parameters=link.parameters,
                peak_bytes=_peak(link.session),
                traffic={op: dataclasses.replace(t) for op, t in link.session.traffic.items()},
            )
            for link in links
        ],
        enclave_peak_bytes=peak_memory_bytes(),
    )


def _peak(session: Session) -> int | None:
    try:
        number = session.request("stats", "-", {}, {}, {})[0].get("peak_memory_bytes")
    except (UsageError, WorkerFault):
        return None
    return number if isinstance(number, int) and number > 0 else None
