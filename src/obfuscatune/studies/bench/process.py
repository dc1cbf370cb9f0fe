"""The benchmark's end of a contender: starts the process, asks it, and ends it whatever happens."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from types import TracebackType
from typing import Any, Literal, Self

from obfuscatune.errors import ObfuscatuneError
from obfuscatune.protocol.waiting import DEFAULT, WAITING
from obfuscatune.studies.bench.contender import ContenderSpec

WaitPolicy = Literal["default", "passive"]
_EXIT_SECONDS = 20.0


class ContenderProcess:
    """A process of one contender.

    Args:
        spec: what it runs. label: how progress and errors name it.
        wait_policy: what its threads do between two parallel regions. ``default`` (torch without us) spins for
            milliseconds, then sleeps; ``passive`` for microseconds (`WAITING`); ``active`` would spin for minutes, into
            the measurements of the other contenders.
    """

    def __init__(self, spec: ContenderSpec, *, label: str, wait_policy: WaitPolicy) -> None:
        self.spec, self.label, self.wait_policy = spec, label, wait_policy
        environment = {name: value for name, value in os.environ.items() if name not in WAITING}
        environment |= WAITING if wait_policy == "passive" else DEFAULT
        command = [sys.executable, "-m", "obfuscatune.studies.bench.contender", json.dumps(dataclasses.asdict(spec))]
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for its reply. Raises ObfuscatuneError where it fails or the process is gone."""
        requests, replies = self._process.stdin, self._process.stdout
        if requests is None or replies is None:
            raise ObfuscatuneError("a contender without pipes", where=self.label)
        try:
            print(json.dumps({"op": op, **arguments}), file=requests, flush=True)
            line = replies.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            raise ObfuscatuneError(
                "a contender of the benchmark is gone",
                got=f"exit status {code}" if code >= 0 else f"killed by signal {-code}",
                where=f"{self.label}, {op}",
                hint="killed by signal 9, it is most often the memory that ran out: try fewer profiles, a smaller size",
            )
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise ObfuscatuneError(
                "a contender of the benchmark failed", got=reply["error"], where=f"{self.label}, {op}"
            )
        return reply

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process: by the end of its input, or at once after an error, when it may be in a long repetition."""
        if error is not None:
            self._process.terminate()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                # Closing flushes again what a dead process did not take.
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        try:
            self._process.wait(timeout=_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
