"""A job on three workers of three operators, each known by its identity, as docs/three-parties.md tells under workers.

Real processes on this machine: an enclave, four workers at ``tls://``, of which the job names three.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from obfuscatune.cli import main
from obfuscatune.errors import ConsentError
from obfuscatune.parties import Party
from obfuscatune.parties.identity import PublicIdentity
from obfuscatune.parties.job import SignedJob
from obfuscatune.parties.sealed.models import model_files
from obfuscatune.parties.vocabulary import Worker
from obfuscatune.settings import TrainingSettings

from .walkthrough import ROOT, Tap, memory_of

pytestmark = pytest.mark.slow
ROWS = [{"prompt": f"the secret of room {i} is", "completion": f" colour number {i * 37}"} for i in range(4)]
OPERATORS = ("lab", "clinic", "cloud")
CONFIG = {"vocab_size": 258, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "eos_token_id": 256}


@dataclass
class Place:
    """The operator's processes, and the two parties in their folders."""

    root: Path
    processes: dict[str, "subprocess.Popen[str]"] = field(default_factory=dict)
    taps: list[Tap] = field(default_factory=list)

    def start(self, name: str, *arguments: object) -> None:
        """Start a process of the command line."""
        command = [sys.executable, "-m", "obfuscatune", *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
        self.processes[name] = subprocess.Popen(  # noqa: S603
            command, cwd=self.root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def ready(self, name: str) -> str:
        """Wait for the line in which a process says where it listens; return the address."""
        said = []
        for line in self.processes[name].stdout or ():
            said.append(line)
            if match := re.search(r"tls://\S+", line):
                return match[0]
        raise AssertionError("".join(said))

    def close(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
            process.wait(30)
            if process.stdout is not None:
                process.stdout.close()
        for tap in self.taps:
            tap.close()

    def party(self, name: str) -> Party:
        return Party.open(self.root / name)


def identity(place: Place, name: str) -> PublicIdentity:
    assert main(["identity", "new", name, "--output_dir", str(place.root), "--suite", "x25519"]) == 0
    return PublicIdentity.load(place.root / f"{name}.pub")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("shared"))
    try:
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config(**CONFIG)).save_pretrained(place.root / "model")
        tokenizer.save_pretrained(place.root / "model")
        serve = ("enclave", "serve", "--platform", "simulation:platform", "--state", "state", "--parties", "parties")
        identity(place, "enclave-of-workers")  # known before the enclave has started for the first time
        addresses = []
        publics = {operator: identity(place, f"gpu-{operator}") for operator in (*OPERATORS, "stranger")}
        for operator in publics:  # they start at the same time
            where = ("--listen", "tls://127.0.0.1:0", "--identity", f"gpu-{operator}.key", "--sandbox", "none")
            place.start(operator, "worker", *where, "--allow", "enclave-of-workers.pub", "--threads", 1)
        for operator, public in publics.items():
            said = place.ready(operator)
            tap = Tap(int(said.split(":")[2].split("#")[0]))
            place.taps.append(tap)
            addresses += ["--worker", f"tls://127.0.0.1:{tap.address[1]}#{public.fingerprint}"]
        known_as = ("--worker_identity", "enclave-of-workers.key")
        place.start("enclave", *serve, "--listen", "tls://127.0.0.1:0", *known_as, *addresses)
        listens = place.ready("enclave")
        made = {"enclave": listens, "simulation": place.root / "platform" / "simulation-root.pem"}
        lab = Party.init("lab", role="provider", folder=place.root / "lab", **made)
        clinic = Party.init(
            "clinic", role="owner", folder=place.root / "clinic", partner=place.root / "lab/lab.pub", **made
        )
        lab = lab.with_partner(place.root / "clinic/clinic.pub")
        for party in (lab, clinic):
            public = party.identity_file.with_suffix(".pub")
            (place.root / "parties" / public.name).write_bytes(public.read_bytes())
            for operator in OPERATORS:
                party.trust(place.root / f"gpu-{operator}.pub", operator)
        rows = place.root / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        lab.seal("model", dict(model_files(place.root / "model")))
        clinic.seal("data", {"data.jsonl": rows, "held_out.jsonl": rows})
        yield place
    finally:
        place.close()


def named(place: Place, operators: tuple[str, ...]) -> tuple[Worker, ...]:
    return tuple(
        Worker(PublicIdentity.load(place.root / f"gpu-{operator}.pub").fingerprint, operator) for operator in operators
    )


def agreed(place: Place, **changes: object) -> SignedJob:
    """A job that both have signed."""
    lab, clinic = place.party("lab"), place.party("clinic")
    settings = TrainingSettings(max_steps=3, logging_steps=1, lora_r=2, max_length=48, learning_rate=1e-2)
    fields = {"profile": "shared", "adapter_to": ("owner",), **changes}
    signed = clinic.propose(partner_inputs=[lab.folder / "model.card"], settings=settings, **fields)
    return lab.sign(clinic.sign(signed))


@pytest.fixture(scope="module")
def done(place: Place) -> Iterator[tuple[SignedJob, Path]]:
    """The job after its end, and where the owner's results are."""
    lab, clinic, signed = place.party("lab"), place.party("clinic"), agreed(place)
    lab.enclave.submit(signed, lab.inputs_of(signed))
    clinic.enclave.submit(signed, clinic.inputs_of(signed))
    last = list(clinic.enclave.watch(signed, interval=0.1))[-1]
    assert last.status == "done", str(last)
    clinic.enclave.fetch(signed, place.root / "results")
    yield signed, place.root / "results"


def test_the_job_ran_on_the_workers_that_it_names(place: Place, done: tuple[SignedJob, Path]) -> None:
    signed, results = done
    status = place.party("lab").enclave.status(signed)  # the provider is told too: its weights are there
    assert signed.job.workers == named(place, OPERATORS)
    assert [(part["worker"], part["operator"], part["form"]) for part in status.workers] == [
        (worker.fingerprint, worker.operator, "shared") for worker in signed.job.workers
    ]
    assert all(part["blocks"] == 2 and part["parameters"] > 10_000 for part in status.workers)
    log = [json.loads(line) for line in (place.root / "state" / "log.jsonl").read_text().splitlines()]
    placed = [entry["details"]["worker"] for entry in log if entry["event"] == "placed"]
    assert placed == [worker.fingerprint for worker in signed.job.workers]
    used = [len(tap.captured) for tap in place.taps]
    assert min(used[:3]) > 100_000 and used[3] == 0, used
    report = json.loads((results / "report" / "report.json").read_text())
    assert report["workers"] == list(status.workers) and len(report["loss"]) == 3
    assert report["held_out"]["loss_after"] < report["held_out"]["loss_before"]
    assert set(status.results) == set()  # nothing of it is the provider's


def test_no_worker_and_no_wire_holds_a_plain_byte(place: Place, done: tuple[SignedJob, Path]) -> None:
    tensors = safetensors.torch.load_file(place.root / "model" / "model.safetensors")
    adapter = safetensors.torch.load_file(done[1] / "adapter" / "adapter_model.safetensors")
    canaries = {name: tensor.contiguous().numpy().tobytes()[:32] for name, tensor in {**tensors, **adapter}.items()}
    canaries = {name: data for name, data in canaries.items() if len(set(data)) > 16 and "c_" in name}
    canaries |= {f"row {number}": row["prompt"].encode() for number, row in enumerate(ROWS[:2])}
    assert len(canaries) > 10
    places = {f"wire to {name}": bytes(tap.captured) for name, tap in zip(OPERATORS, place.taps, strict=False)}
    places["memory of cloud"] = b"".join(memory_of(place.processes["cloud"].pid))
    places["disk"] = b"".join(path.read_bytes() for path in (place.root / "state").rglob("*") if path.is_file())
    for where, data in places.items():
        assert len(data) > 50_000 and not [name for name, canary in canaries.items() if canary in data], where
    plain = (place.root / "model" / "model.safetensors").read_bytes() + (place.root / "rows.jsonl").read_bytes()
    assert sum(canary in plain for canary in canaries.values()) >= 10  # the control: they can be found


def test_workers_beyond_the_terms_are_refused(place: Place, done: tuple[SignedJob, Path]) -> None:
    others = named(place, ("lab", "clinic", "stranger"))
    with pytest.raises(ConsentError, match=r"the worker \w+ of stranger"):
        agreed(place, workers=others)


def test_a_job_that_names_a_worker_which_the_operator_has_not_fails_by_name(place: Place, done: object) -> None:
    """A worker that both owners trust, and whom the enclave has no address of."""
    lab, clinic = place.party("lab"), place.party("clinic")
    absent = {"fingerprint": "ab" * 32, "operator": "elsewhere"}
    table = f'[[workers]]\nfingerprint = "{"ab" * 32}"\noperator = "elsewhere"\n'
    for party, kind, files in (
        (lab, "model", dict(model_files(place.root / "model"))),
        (clinic, "data", {"data.jsonl": place.root / "rows.jsonl"}),
    ):
        party.terms_file.write_text(party.terms_file.read_text() + table)
        for suffix in (".sealed", ".card"):
            (party.folder / f"{kind}{suffix}").unlink()
        party.seal(kind, files)
    signed = agreed(place, workers=(*named(place, OPERATORS[:2]), Worker(**absent)))
    lab.enclave.submit(signed, lab.inputs_of(signed))
    clinic.enclave.submit(signed, clinic.inputs_of(signed))
    last = list(clinic.enclave.watch(signed, interval=0.1))[-1]
    assert last.status == "failed" and "has not the workers that the job names" in last.reason
    assert clinic.enclave.delete(signed).status == "deleted"
    assert [status.status for status in lab.enclave.jobs()] == ["done", "deleted"]
