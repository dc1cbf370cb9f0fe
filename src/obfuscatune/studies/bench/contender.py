"""One contender of the benchmark, in a process of its own: holds a model and repeats workloads when asked.

Asked over standard input and answering over standard output, one JSON object a line. Between two requests it is blocked
in a read, so that it takes no core from the contender that is being measured.
"""

import gc
import json
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, Any

import torch
import transformers

from obfuscatune.enclave.protect import protect
from obfuscatune.enclave.protected import Protected
from obfuscatune.errors import ObfuscatuneError
from obfuscatune.profiles import Profile
from obfuscatune.protocol.memory import keep_freed_memory, peak_memory_bytes
from obfuscatune.studies.bench.link import LinkKind, worker_at
from obfuscatune.studies.bench.workloads import SIZES, WORKLOADS, Repetition, Shape, Subject, build_model, with_adapter
from obfuscatune.training.loading import load, load_model

LEARNING_RATE = 1e-4


@dataclass(frozen=True, slots=True)
class ContenderSpec:
    """What one contender runs.

    Attributes:
        size: a key of ``SIZES``, or any name where there is a directory. shape: of the workloads.
        profile: the switches of a profile; None runs the model in the clear, as Hugging Face and PEFT do.
        threads: of this process, and as many of its worker, which computes while this process waits. Workers of shares
            compute at the same time, and have the parts of them that `protect` gives each.
        device: where the plain model runs, or the worker. dtype: of the weights.
        directory: of the model; None builds a GPT-2 of that size in memory. link: how the worker is reached.
    """

    size: str
    shape: Shape
    profile: Profile | None
    threads: int
    device: str
    dtype: str = "float32"
    directory: str | None = None
    link: LinkKind = "spawn"

    @property
    def name(self) -> str:
        """How tables name it: the profile, and its link if the worker is not spawned."""
        if self.profile is None:
            return "plain"
        return self.profile.name if self.link == "spawn" else f"{self.profile.name}@{self.link}"


class Contender:
    """Holds the model of a spec, plain or protected, with or without an adapter, and repeats workloads on it."""

    def __init__(self, spec: ContenderSpec) -> None:
        self.spec = spec
        self.protected: Protected | None = None
        self._worker = ExitStack()
        self._model: Any = None
        self._repetitions: dict[str, Repetition] = {}

    def load(self, *, adapter: bool) -> dict[str, Any]:
        """Build the model anew and protect it; returns the seconds of the latter, a worker's start included."""
        self.close()
        gc.collect()  # the former model goes before the next one comes
        self._model = self._build(adapter)
        if self.spec.profile is None:
            self._model.to(self.spec.device)
            return {"obfuscation_seconds": 0.0}
        options: dict[str, Any] = {}
        started = time.perf_counter()
        if self.spec.profile.remote:
            threads = None if self.spec.profile.shares else self.spec.threads
            at = worker_at(self.spec.link, device=self.spec.device, threads=threads)
            options = self._worker.enter_context(at)
        self.protected = protect(self._model, profile=self.spec.profile, **options)
        return {"obfuscation_seconds": time.perf_counter() - started}

    def run(self, *, workload: str) -> dict[str, Any]:
        """Do one repetition; returns its seconds, and the calls and bytes that crossed the boundary meanwhile."""
        if workload not in self._repetitions:
            self._repetitions[workload] = WORKLOADS[workload].prepare(self._subject(), self.spec.shape)
        repeat = self._repetitions[workload]
        calls, moved = self._crossed()
        started = time.perf_counter()
        repeat()
        if self.spec.profile is None and torch.device(self.spec.device).type == "cuda":
            torch.cuda.synchronize(self.spec.device)  # a worker's replies wait for its device by themselves
        seconds = time.perf_counter() - started
        calls_after, moved_after = self._crossed()
        return {"seconds": seconds, "calls": calls_after - calls, "bytes": moved_after - moved}

    def report(self) -> dict[str, Any]:
        """Return peak memory so far of this process, of its workers together, and the enclave's share of parameters."""
        if self.protected is None:
            peak = peak_memory_bytes()
            return {"enclave_peak_bytes": peak, "worker_peak_bytes": None, "enclave_share": 1.0}
        report = self.protected.report()
        return {
            "enclave_peak_bytes": report.enclave_peak_bytes,
            "worker_peak_bytes": sum(part.peak_bytes or 0 for part in report.workers) or None,
            "enclave_share": report.enclave_share,
        }

    def close(self) -> None:
        """Let go of the model, and of the worker if there is one."""
        if self.protected is not None:
            self.protected.close()
        self._worker.close()
        self.protected, self._model, self._repetitions = None, None, {}

    def _build(self, adapter: bool) -> Any:
        directory, dtype = self.spec.directory, self.spec.dtype
        if directory is None:
            return build_model(SIZES[self.spec.size], adapter=adapter, dtype=dtype)
        model = load_model(directory, dtype) if self.spec.profile is None else load(directory, dtype)
        torch.manual_seed(0)
        return with_adapter(model) if adapter else model

    def _subject(self) -> Subject:
        model = self._model
        if self.protected is not None:
            protected = self.protected
            return Subject(model, lambda: protected.create_optimizer(lr=LEARNING_RATE), torch.device("cpu"))

        def plain_optimizer() -> torch.optim.Optimizer:
            return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)

        return Subject(model, plain_optimizer, torch.device(self.spec.device))

    def _crossed(self) -> tuple[int, int]:
        if self.protected is None:
            return 0, 0
        traffic = [t for link in self.protected.links for t in link.session.traffic.values()]
        return sum(t.calls for t in traffic), sum(t.bytes_sent + t.bytes_received for t in traffic)


def read_spec(text: str) -> ContenderSpec:
    """Return the spec that the benchmark wrote with ``json.dumps(dataclasses.asdict(spec))``."""
    fields = json.loads(text)
    fields["shape"] = Shape(**fields["shape"])
    fields["profile"] = None if fields["profile"] is None else Profile(**fields["profile"])
    return ContenderSpec(**fields)


def serve(contender: Contender, requests: IO[str], replies: IO[str]) -> None:
    """Answer requests ``{"op": NAME, ...}`` until there are no more."""
    operations: dict[str, Callable[..., dict[str, Any]]] = {
        "load": contender.load,
        "run": contender.run,
        "report": contender.report,
    }
    for line in requests:
        arguments = json.loads(line)
        try:
            reply = operations[arguments.pop("op")](**arguments)
        except ObfuscatuneError as error:
            reply = {"error": str(error)}
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}, see its traceback above"}
        print(json.dumps(reply), file=replies, flush=True)


def main() -> None:
    """Serve on standard input and output; the first argument is the spec."""
    # The terminal's Ctrl-C goes to the whole process group. The benchmark decides, and ends its contenders.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # with the worker that it has started
    # What there is to say about the options, the benchmark's own process says, once.
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(logging.ERROR)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not end up among the replies
    keep_freed_memory()  # plain ones too
    spec = read_spec(sys.argv[1])
    torch.set_num_threads(spec.threads)
    contender = Contender(spec)
    try:
        serve(contender, sys.stdin, replies)
    finally:
        contender.close()


if __name__ == "__main__":
    main()
