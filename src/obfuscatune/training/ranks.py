"""Several enclaves that train one adapter, each on its part of the rows, with a worker of its own: data parallel.

torchrun starts a process for each and says in the environment which one it is; the stock Trainer wraps the model in
DistributedDataParallel, which averages the adapter's gradients. What crosses between the processes are those gradients:
they tell of the data, and gloo sends them in the clear. So all processes are on one machine, in one enclave, unless
gloo's own TLS is switched on.
"""

import os
from dataclasses import dataclass

from obfuscatune.errors import UsageError
from obfuscatune.profiles import Profile

_TLS = ("GLOO_DEVICE_TRANSPORT_TCP_TLS_PKEY", "GLOO_DEVICE_TRANSPORT_TCP_TLS_CERT")


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which process this is, and of how many: ``rank`` from 0 to ``size - 1``; ``local``: how many on this machine."""

    rank: int = 0
    size: int = 1
    local: int = 1

    @property
    def first(self) -> bool:
        """Whether this process prints, saves and reports."""
        return self.rank == 0

    @classmethod
    def of_environment(cls) -> "Ranks":
        """Read what torchrun says; one process where it says nothing.

        Raises:
            UsageError: the processes are on several machines, and their link is not encrypted; or only a part is said.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        if missing := [name for name in names if name not in os.environ]:
            # By LOCAL_RANK the stock Trainer decides whether there are several processes.
            if os.environ.get("LOCAL_RANK", "-1") != "-1" or os.environ.get("WORLD_SIZE", "1") != "1":
                what = "the environment tells of several processes, and not how many are on this machine"
                raise UsageError(what, got=f"no {', '.join(missing)}", hint="torchrun sets them")
            return cls()
        try:
            ranks = cls(*(int(os.environ[name]) for name in names))
        except ValueError:
            raise UsageError("torchrun's environment is not of numbers", where=", ".join(names)) from None
        encrypted = os.environ.get("GLOO_DEVICE_TRANSPORT") == "TCP_TLS" and all(os.environ.get(name) for name in _TLS)
        if ranks.local < ranks.size and not encrypted:
            raise UsageError(
                "enclaves on several machines would exchange gradients in the clear",
                got=f"{ranks.size} processes, {ranks.local} of them here",
                expected="all on one machine, or gloo under TLS",
                hint=f"GLOO_DEVICE_TRANSPORT=TCP_TLS with {' and '.join(_TLS)}",
            )
        return ranks

    def workers_of(self, workers: list[str]) -> list[str]:
        """Return this process's own workers, of those of all processes.

        Raises:
            UsageError: not as many for each process; ``spawn`` alone is one for each.
        """
        if self.size == 1 or workers == ["spawn"]:
            return workers
        count, rest = divmod(len(workers), self.size)
        if rest or not count:
            raise UsageError(
                "not as many workers for each process",
                got=f"{len(workers)} workers",
                expected=f"{self.size}, or as many again for each of the {self.size} processes",
                where="--worker",
            )
        return workers[self.rank * count : (self.rank + 1) * count]

    def check(self, profile: Profile, *, overlap: bool) -> None:
        """Refuse what several processes cannot do together.

        Raises:
            UsageError: LoRA factors on the workers, whose gradients nobody averages; or two halves of a batch at once.
        """
        if self.size == 1:
            return
        if profile.lora_placement == "worker":
            hint = "lora_placement=enclave, or a profile that has it: balanced, strict, stream"
            what = "several processes do not fit LoRA factors on the worker"
            raise UsageError(what, got=f"profile {profile.name}", hint=hint)
        if overlap:
            raise UsageError("several processes do not fit --overlap", hint="leave one of them out")

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any of the processes; all of them must ask."""
        if self.size == 1:
            return flag
        import torch
        import torch.distributed as dist

        votes = torch.tensor(int(flag))
        dist.all_reduce(votes)
        return bool(votes.item())

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()
