"""What is where, what crossed the boundary, and what it cost: counted, not estimated."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from obfuscatune.enclave.session import Session, Traffic
from obfuscatune.errors import UsageError, WorkerFault
from obfuscatune.profiles import Profile
from obfuscatune.protocol.memory import peak_memory_bytes


@dataclass(frozen=True, slots=True)
class Report:
    """Counts of one session: bytes with their framing, seconds spent waiting for replies."""

    profile: Profile
    worker: str
    enclave_parameters: int
    worker_parameters: int
    total_parameters: int
    traffic: dict[str, Traffic]
    enclave_peak_bytes: int
    worker_peak_bytes: int | None

    @property
    def enclave_share(self) -> float:
        """Share of the model's parameters that are in the enclave in the clear."""
        return self.enclave_parameters / max(1, self.total_parameters)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and strings, for JSON."""
        return {**dataclasses.asdict(self), "enclave_share": self.enclave_share}

    def __str__(self) -> str:
        share = f"{100 * self.enclave_share:.1f} % of {self.total_parameters:,}"
        lines = [
            f"profile {self.profile.name}: {self.profile.summary}",
            f"parameters  {self.enclave_parameters:>14,} in the enclave in the clear ({share})",
            f"            {self.worker_parameters:>14,} on the worker, under this profile's keys ({self.worker})",
        ]
        if self.traffic:
            lines.append(f"{'requests':<12}{'calls':>10}{'MB sent':>12}{'MB received':>13}{'s waiting':>12}")
        for op, t in self.traffic.items():
            lines.append(
                f"{op:<12}{t.calls:>10,}{t.bytes_sent / 1e6:>12.2f}{t.bytes_received / 1e6:>13.2f}{t.seconds:>12.2f}"
            )
        worker = f", worker {self.worker_peak_bytes / 2**20:,.0f} MiB" if self.worker_peak_bytes else ""
        lines.append(f"peak memory enclave {self.enclave_peak_bytes / 2**20:,.0f} MiB{worker}")
        return "\n".join(lines)


def make_report(profile: Profile, session: Session | None, *, enclave: int, worker: int, total: int) -> Report:
    """Collect the counts; asks the worker for its own memory, if it still answers."""
    peak = None
    if session is not None:
        try:
            reply, _ = session.request("stats", "-", {}, {}, {})
            number = reply.get("peak_memory_bytes")
            peak = number if isinstance(number, int) and number > 0 else None
        except (UsageError, WorkerFault):
            peak = None
    return Report(
        profile=profile,
        worker="no worker" if session is None else session.worker,
        enclave_parameters=enclave,
        worker_parameters=worker,
        total_parameters=total,
        traffic={} if session is None else {op: dataclasses.replace(t) for op, t in session.traffic.items()},
        enclave_peak_bytes=peak_memory_bytes(),
        worker_peak_bytes=peak,
    )
