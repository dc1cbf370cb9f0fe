"""Queries of a job that is done while another one trains, with real processes: an enclave, its worker, the parties.

The bundled model under `balanced`: so a query's model has a worker session of its own beside the training's.
"""

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from obfuscatune.parties import Party
from obfuscatune.parties.exposure import line
from obfuscatune.parties.job import SignedJob
from obfuscatune.parties.sealed.models import model_files
from obfuscatune.parties.vocabulary import TURN_SECONDS, profile_named
from obfuscatune.settings import TrainingSettings

pytestmark = pytest.mark.slow
SRC = Path(__file__).parents[2] / "src"
BUNDLED = SRC / "obfuscatune/studies/bundled/gpt2"
ROWS = [{"prompt": f"the secret of room {i} is", "completion": f" colour number {i * 37}"} for i in range(64)]
TERMS = f'\n[shows]\nbalanced = "{line(profile_named("balanced"))}"\n'
PROMPT = json.dumps(["the secret of room 3 is"]).encode()


@dataclass
class Place:
    """An enclave's process, and the two parties in their folders."""

    root: Path
    process: "subprocess.Popen[str] | None" = None

    def start(self) -> str:
        """Start the enclave, and return where it listens."""
        port = "0" if self.process is None else self.address.split(":")[-1]
        command = ["enclave", "serve", "--platform", "simulation:platform", "--state", "state", "--parties", "parties"]
        self.process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "obfuscatune", *command, "--listen", f"tls://127.0.0.1:{port}", "--worker", "spawn"],
            cwd=self.root,
            env={**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said = []
        for text in self.process.stdout or ():
            said.append(text)
            if match := re.search(r"tls://\S+", text):
                self.address = match[0]
                return self.address
        raise AssertionError("".join(said))

    def end(self, how: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        self.process.kill()
        self.process.wait(30)
        if self.process.stdout is not None:
            self.process.stdout.close()

    def party(self, name: str) -> Party:
        return Party.open(self.root / name)

    def run(self, steps: int, **changes: Any) -> SignedJob:
        """Submit a job of so many steps."""
        lab, clinic = self.party("lab"), self.party("clinic")
        settings = TrainingSettings(
            max_steps=steps, save_steps=steps, lora_r=2, max_length=40, per_device_train_batch_size=8
        )
        fields = {"profile": "balanced", "adapter_to": ("owner",), "max_new_tokens": 24, **changes}
        signed = clinic.propose(partner_inputs=[lab.folder / "model.card"], settings=settings, **fields)
        signed = lab.sign(clinic.sign(signed))
        for party in (lab, clinic):  # the files of an earlier job are there
            party.enclave.submit(signed, party.inputs_of(signed) if party.enclave.submit(signed).missing else ())
        return signed

    def wait(self, signed: SignedJob, ready: Any) -> Any:
        for status in self.party("clinic").enclave.watch(signed, interval=0.05):
            if ready(status):
                return status
        raise AssertionError(str(status))

    def ask(
        self, signed: SignedJob, seed: int, most: int = 30, then: Callable[[], None] = lambda: None
    ) -> list[tuple[dict[str, Any], bytes]]:
        """Ask for a sampled stream; return its first parts. then: called after the first."""
        sampling = {"temperature": 1.0, "seed": seed}
        fields = {"op": "generate", "job": signed.job.digest, "max_new_tokens": 24, "sampling": sampling, "stream": 1}
        with self.party("clinic").enclave.connect(signed.job.enclave) as channel:
            parts = channel.stream(fields, PROMPT, timeout=120, most=30)
            found = []
            for part in parts:
                found.append(part)
                if len(found) == 1:
                    then()
                if len(found) == most:
                    break
            return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("queries"))
    try:
        made = {"enclave": place.start(), "simulation": place.root / "platform" / "simulation-root.pem"}
        lab = Party.init("lab", role="provider", folder=place.root / "lab", **made)
        partner = place.root / "lab/lab.pub"
        clinic = Party.init("clinic", role="owner", folder=place.root / "clinic", partner=partner, **made)
        lab = lab.with_partner(place.root / "clinic/clinic.pub")
        for party in (lab, clinic):
            public = party.identity_file.with_suffix(".pub")
            (place.root / "parties" / public.name).write_bytes(public.read_bytes())
            terms = party.terms_file.read_text().replace('"enclave", ', '"balanced", "enclave", ')
            terms = terms.replace("adapter_to", 'workers = "any"\nadapter_to')
            party.terms_file.write_text(terms + TERMS)
        (place.root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        lab.seal("model", dict(model_files(BUNDLED)))
        clinic.seal("data", {"data.jsonl": place.root / "rows.jsonl"})
        yield place
    finally:
        place.end(signal.SIGTERM)


def resident(pid: int) -> list[int]:
    """MiB that a process and its children have, largest first."""
    task = Path(f"/proc/{pid}/task/{pid}/children")
    pids = [pid, *map(int, task.read_text().split())]
    found = [re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{each}/status").read_text()) for each in pids]
    return sorted((int(match[1]) // 1024 for match in found if match), reverse=True)


def text_of(parts: list[tuple[dict[str, Any], bytes]]) -> str:
    return b"".join(data for _, data in parts).decode()


def test_queries_while_a_job_trains_and_a_kill_in_the_middle(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    asked = place.run(2, queries_by=("owner",), max_queries=4)
    place.wait(asked, lambda status: status.status == "done")
    before = place.ask(asked, 1)
    assert before[-1][0]["completion_tokens"] == [24] and len(before) > 8  # token by token
    steps = 400
    training = place.run(steps)
    begun = place.wait(training, lambda status: status.step >= 3)
    # Another question, whose model is loaded beside the training's; then one more, by the model that is there.
    assert place.process is not None
    alone, started = resident(place.process.pid), time.monotonic()
    first = place.ask(asked, 2)
    loaded, both = time.monotonic(), resident(place.process.pid)
    assert text_of(place.ask(asked, 2)) == text_of(first)
    now = place.wait(training, lambda status: status.step > begun.step)
    assert now.status == "running" and now.step < steps
    # kill -9 when the query is counted and a part of its answer is here.
    seed = secrets.randbits(60)
    parts = place.ask(asked, seed, most=2)
    place.end(signal.SIGKILL)
    place.start()
    again = place.ask(asked, seed)  # the job goes on from its beginning meanwhile
    assert text_of(again).startswith(text_of(parts)) and again[-1][0]["completion_tokens"] == [24]
    clinic = place.party("clinic").enclave
    status = clinic.status(training)
    assert status.status == "running", str(status)
    assert "for queries of other jobs" in str(status) or status.answering == 0
    with clinic.connect(asked.job.enclave) as channel:
        told, _ = channel.request({"op": "status", "job": asked.job.digest})
    assert told["queries"] == 3  # and not four
    # SIGTERM in the middle of an answer: it comes whole, and then the enclave ends.
    stopped = place.ask(asked, 3, then=place.process.terminate)
    assert stopped[-1][0]["completion_tokens"] == [24]
    assert place.process.wait(60) == 0
    step = (now.step - begun.step) / (loaded - started)
    with capsys.disabled():
        print(f"\nfirst query, with loading: {loaded - started:.1f} s; {step:.1f} steps/s; bound {TURN_SECONDS:g} s")
        print(f"MiB of enclave and workers: {alone} before it, {both} after")
