"""Which workers a job gets: those that it names, by identity, out of those that the operator offers.

A worker at ``tls://`` proves its identity when the enclave connects (`parties.link`), so a job that names workers is
run on these and on no others. One at ``unix://``, ``tcp://`` or of our own proves none: it serves only jobs that leave
the choice to the operator, as both owners' terms must allow.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from obfuscatune.enclave.links import Link
from obfuscatune.errors import UsageError
from obfuscatune.parties.job import Job
from obfuscatune.parties.vocabulary import MAX_WORKERS
from obfuscatune.protocol.address import Address
from obfuscatune.service.consent import LackingError


@dataclass(frozen=True)
class Placed:
    """What one worker has got of a model: no content, for both owners and the audit log.

    Attributes:
        worker: fingerprint of its identity, empty where it proves none. operator: as the job says. blocks, parameters:
            of the model. form: ``keyed``, or ``shared`` for a secret share of each of them, or ``open``.
    """

    worker: str
    operator: str
    blocks: int
    parameters: int
    form: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Workers:
    """The workers that the operator offers: ``addresses`` in their order, and those with an identity by it."""

    addresses: tuple[str, ...]
    by_identity: dict[str, str]

    @classmethod
    def parse(cls, addresses: Sequence[str], *, insecure: bool = False) -> "Workers":
        """Check the operator's addresses before anything is served.

        Raises:
            UsageError: none or too many, one that is none or has no fingerprint, ``tcp://`` beyond this machine, or one
                identity twice.
        """
        if not 1 <= len(addresses) <= MAX_WORKERS:
            raise UsageError("number of workers", got=len(addresses), expected=f"1 to {MAX_WORKERS}")
        found: dict[str, str] = {}
        for text in addresses:
            if text == "spawn":
                continue
            address = Address.of_worker(text, insecure, "--insecure")
            if not address.tls:
                continue
            if address.fingerprint in found:
                raise UsageError("one worker is given twice", where=f"{found[address.fingerprint]} and {text}")
            found[address.fingerprint] = text
        return cls(tuple(addresses), found)

    def of(self, job: Job) -> list[str]:
        """Return the addresses for a job, in its order.

        Raises:
            LackingError: the operator does not offer a worker that the job names.
        """
        if not job.workers:
            return list(self.addresses)
        lacking = [worker for worker in job.workers if worker.fingerprint not in self.by_identity]
        if lacking:
            raise LackingError(
                "the enclave has not the workers that the job names",
                got=", ".join(f"none {worker.fingerprint[:16]} of {worker.operator}" for worker in lacking),
                hint="obfuscatune enclave serve --worker tls://HOST:PORT#FINGERPRINT, once for each",
            )
        return [self.by_identity[worker.fingerprint] for worker in job.workers]


def placed(job: Job, links: Sequence[Link]) -> list[Placed]:
    """Return what each worker of a protected model has got; ``links`` are in the order of the job's workers."""
    profile = job.resolved
    form = profile.weights if profile.shares else "keyed"
    named = [(worker.fingerprint, worker.operator) for worker in job.workers] or [("", "")] * len(links)
    return [
        Placed(fingerprint, operator, len(link.blocks), link.parameters, form)
        for (fingerprint, operator), link in zip(named, links, strict=True)
    ]
