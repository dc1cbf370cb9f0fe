"""docs/three-parties.md, run as it stands: the whole job works, and the operator never holds a plain byte of it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx2
import openai
import pytest
import safetensors.torch

from obfuscatune.parties.sealed.header import read_header

from .walkthrough import Machines, _family, commands

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """The machines after the whole walk, with every command's output, the worker still running."""
    root = tmp_path_factory.mktemp("walk")
    machines = Machines(root, max_steps=60)
    outputs = []
    try:
        for machine, command in commands():
            if "job submit" in command and "--attach data" in command:
                outputs.append((machine, command, machines.run(machine, command)))
                _kill_after_a_checkpoint(machines)
                continue
            outputs.append((machine, command, machines.run(machine, command)))
        yield machines, outputs
    finally:
        machines.close()


def _kill_after_a_checkpoint(machines: Machines) -> None:
    """kill -9 of the enclave in the middle of the job, and a new start: the job goes on from its checkpoint."""
    log = machines.root / "operator" / "state" / "log.jsonl"
    machines.wait(lambda: b'"event":"checkpoint"' in log.read_bytes(), "a checkpoint")
    machines.kill("enclave")
    machines.start("enclave")


def _output(outputs, *words: str) -> str:
    found = [text for _, command, text in outputs if all(word in command for word in words)]
    assert len(found) == 1, words
    return found[0]


def test_the_job_is_done_and_each_has_what_is_his(walked):
    machines, outputs = walked
    assert "done" in _output(outputs, "job watch")
    results = machines.root / "owner" / "results"
    rows = [json.loads(line) for line in (results / "output" / "generations.jsonl").read_text().splitlines()]
    prompts = (machines.root / "owner" / "prompts.jsonl").read_text().splitlines()
    assert [row["prompt"] for row in rows] == [json.loads(line)["prompt"] for line in prompts]
    assert _right_answers(rows) > len(rows) // 2  # taught by the records; by chance one in eight values
    adapter = safetensors.torch.load_file(results / "adapter" / "adapter_model.safetensors")
    assert any(tensor.abs().sum() > 0 for name, tensor in adapter.items() if "lora_B" in name)
    assert not (machines.root / "provider" / "results").exists()


def _right_answers(rows) -> int:
    from obfuscatune.studies.bundled import DemoSettings
    from obfuscatune.studies.bundled.records import company_records

    _, questions = company_records(DemoSettings().seed, DemoSettings().facts)
    right = {question["question"]: question["choices"][question["answer"]] for question in questions}
    return sum(row["completion"].split()[:1] == right[row["prompt"]].split()[:1] for row in rows)


def test_it_went_on_after_kill_9(walked):
    machines, _ = walked
    lines = (machines.root / "operator" / "state" / "log.jsonl").read_text().splitlines()
    events = [json.loads(line)["event"] for line in lines]
    assert events.count("enclave-started") == 2
    assert events.index("checkpoint") < events.index("resumed") < events.index("done")
    steps = [json.loads(line)["details"]["step"] for line in lines if json.loads(line)["event"] == "checkpoint"]
    assert steps == sorted(set(steps)), "a step was trained and saved twice: it did not resume"


def test_the_verdict_says_simulation_and_the_log_holds(walked):
    _, outputs = walked
    verdicts = [text for _, command, text in outputs if "attest verify" in command]
    assert len(verdicts) == 2 and all("SIMULATION" in text for text in verdicts)
    assert "the chain is whole" in _output(outputs, "log check")


def test_the_usual_client_asks_the_enclave_through_connect(walked):
    machines, outputs = walked
    (line,) = [command for _, command, _ in outputs if command.startswith("obfuscatune generate --enclave")]
    # Through the tap, as all that the parties say.
    options = line.split(" --prompt ")[0].replace(":7443", f":{machines.tap.address[1]}").split()[2:]
    command = [sys.executable, "-m", "obfuscatune", "connect", *options, "--port", "0"]
    with subprocess.Popen(  # noqa: S603
        command, cwd=machines.root / "owner", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            said = ""
            while "page: " not in said:
                said += process.stdout.readline() or pytest.fail(said)
            url, token = re.search("at (http://.*)", said)[1], re.search("token: (.*)", said)[1]
            with openai.OpenAI(base_url=url, api_key=token, max_retries=0) as client:
                with pytest.raises(openai.BadRequestError, match="too long"):
                    client.completions.create(model="job", prompt="bird " * 500)
                prompt = "the colour of strange bird is"
                reply = client.completions.create(model="job", prompt=prompt, max_tokens=3)
                assert reply.choices[0].text.strip() == _output(outputs, "generate --enclave").strip()
                assert reply.usage.prompt_tokens > 3
                told = httpx2.get(f"{url}/job", headers={"Authorization": f"Bearer {token}"}).json()
                assert (told["status"], told["queries"]) == ("done", 1)  # what was asked before is still known
        finally:
            process.terminate()


def _canaries(machines: Machines) -> dict[str, bytes]:
    """Pieces of everything that is private, long enough to turn up nowhere by chance."""
    provider, owner = machines.root / "provider", machines.root / "owner"
    found = {}
    tensors = safetensors.torch.load_file(provider / "model" / "model.safetensors")
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        data = tensor.contiguous().numpy().tobytes()
        if number % 3 == 0 and len(set(data[:64])) > 16:  # not one of all zeros or ones
            found[f"model {name}"] = data[:32]
            found[f"model {name}, middle"] = data[len(data) // 8 * 4 :][:32]
    tokenizer = (provider / "model" / "tokenizer.json").read_bytes()
    found["tokenizer"] = tokenizer[len(tokenizer) // 2 :][:64]
    for number, line in enumerate((owner / "records.jsonl").read_text().splitlines()[:40]):
        found[f"record {number}"] = json.loads(line)["prompt"].encode()
    for number, line in enumerate((owner / "prompts.jsonl").read_text().splitlines()):
        found[f"prompt {number}"] = json.loads(line)["prompt"].encode()
    for name, tensor in safetensors.torch.load_file(
        owner / "results" / "adapter" / "adapter_model.safetensors"
    ).items():
        found[f"adapter {name}"] = tensor.contiguous().numpy().tobytes()[:32]
    return found


def _found(canaries: dict[str, bytes], haystack: bytes) -> list[str]:
    return [name for name, needle in canaries.items() if needle in haystack]


def test_canaries_are_found_where_they_are(walked):
    """The control of the three searches below: the same search, where the content is."""
    machines, _ = walked
    canaries = _canaries(machines)
    assert len(canaries) > 100
    plain = b"".join(
        path.read_bytes()
        for name in ("provider", "owner")
        for path in (machines.root / name).rglob("*")
        if path.is_file()
    )
    assert sorted(_found(canaries, plain)) == sorted(canaries)


def test_no_file_of_the_operator_holds_a_plain_byte(walked):
    machines, _ = walked
    canaries = _canaries(machines)
    files = [path for path in (machines.root / "operator").rglob("*") if path.is_file()]
    assert {"state.sealed", "log.jsonl", "enclave.pub"} <= {path.name for path in files}
    assert sum(path.suffix == ".sealed" for path in files) >= 6  # state, model, data, prompts, adapter, output
    for path in files:
        assert not _found(canaries, path.read_bytes()), path


def test_no_traffic_between_the_parties_holds_a_plain_byte(walked):
    machines, _ = walked
    captured = bytes(machines.tap.captured)
    size = (machines.root / "provider" / "model.sealed").stat().st_size
    assert len(captured) > size, "the capture does not hold the upload of the model"
    assert not _found(_canaries(machines), captured)


def test_no_traffic_between_enclave_and_worker_holds_a_plain_byte(walked):
    machines, _ = walked
    captured = bytes(machines.worker_tap.captured)
    assert len(captured) > 100_000_000  # keyed weights twice, and every step's activations
    assert not _found(_canaries(machines), captured)


def test_the_workers_memory_holds_no_plain_byte(walked):
    machines, _ = walked
    canaries = _canaries(machines)
    pythons = [pid for pid in _family(machines.processes["worker"].pid) if "python" in os.readlink(f"/proc/{pid}/exe")]
    assert len(pythons) >= 3, "the process outside, the one that accepts, and the session's, which has the weights"
    memory = b"".join(machines.memory_of("worker"))
    assert len(memory) > 50_000_000  # torch alone is more: it was read
    assert not _found(canaries, memory)


def test_nothing_is_left_in_ram_directories_when_the_enclave_ends(walked):
    machines, _ = walked
    machines.stop("enclave")
    pids = {process.pid for process, _ in machines.readers}
    assert len(pids) >= 3  # the worker, the enclave that was killed, the one that went on
    left = list(Path("/dev/shm").glob("obfuscatune-enclave.*"))  # noqa: S108 - only looked at
    assert not [path for path in left if int(path.name.split(".")[1]) in pids]


def test_an_older_state_put_back_is_refused(walked):
    """Rollback: the operator keeps a copy of the whole state, lets the enclave go on, and puts the copy back."""
    machines, _ = walked
    machines.stop("enclave")
    state = machines.root / "operator" / "state"
    shutil.copytree(state, machines.root / "kept")
    machines.start("enclave")
    machines.stop("enclave")
    shutil.rmtree(state)
    shutil.copytree(machines.root / "kept", state)
    text = machines.fails_to_start("enclave")
    assert re.search("older", text), text


def test_digests_in_the_job_are_those_of_the_files(walked):
    machines, _ = walked
    job = json.loads((machines.root / "owner" / "job.json").read_text())["job"]
    assert job["model"] == read_header(machines.root / "provider" / "model.sealed").digest
    assert job["data"] == read_header(machines.root / "owner" / "data.sealed").digest
