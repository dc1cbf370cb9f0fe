"""docs/three-parties.md, run as it stands: the whole job works, and the operator never holds a plain byte of it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import safetensors.torch

from obfuscatune.parties.exposure import hides_all
from obfuscatune.parties.sealed.header import read_header
from obfuscatune.parties.terms import Terms
from obfuscatune.parties.vocabulary import profile_named

from .walkthrough import Machines, commands

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """The machines after the whole walk, with every command's output, the worker still running."""
    root = tmp_path_factory.mktemp("walk")
    machines = Machines(root, max_steps=60)
    outputs = []
    try:
        for machine, command in commands():
            if machine == "owner" and "job run" in command:
                running = machines.begin(machine, command)
                try:
                    _kill_after_a_checkpoint(machines)
                    text, _ = running.communicate(timeout=240)
                finally:
                    running.kill()
                assert running.returncode == 0, text
                outputs.append((machine, command, text))
                continue
            if "job delete" in command:
                shutil.copytree(root / "operator" / "state" / "store", root / "store")
                machines.kept = [path for path in (root / "store").rglob("*") if path.is_file()]
            outputs.append((machine, command, machines.run(machine, command)))
            if command.startswith("obfuscatune generate --job"):
                machines.asked = _ask_through_connect(machines, command)
        yield machines, outputs
    finally:
        machines.close()


def _kill_after_a_checkpoint(machines: Machines) -> None:
    """kill -9 of the enclave in the middle of the job, and a new start: the job goes on from its checkpoint."""
    log = machines.root / "operator" / "state" / "log.jsonl"
    # The second entry is there after the first was committed; an entry alone is on the disk before that.
    machines.wait(lambda: log.read_bytes().count(b'"event":"checkpoint"') >= 2, "two checkpoints")
    machines.kill("enclave")
    machines.start("enclave")


def _output(outputs, *words: str) -> str:
    found = [text for _, command, text in outputs if all(word in command for word in words)]
    assert len(found) == 1, words
    return found[0]


def test_the_job_is_done_and_each_has_what_is_his(walked):
    machines, outputs = walked
    text = _output(outputs, "job run ../provider/job.json")
    assert "done" in text and re.search(r"loss .* at step 1, .* at step 60", text)
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
    verdicts = [text for _, command, text in outputs if "party verify" in command]
    assert len(verdicts) == 2 and all("SIMULATION" in text for text in verdicts)
    assert "the chain is whole" in _output(outputs, "log fetch second.log", "--earlier")


def test_the_walk_is_short_and_copies_nothing_by_hand():
    lines = [command for _, command in commands()]
    assert len(lines) <= 19
    assert not [line for line in lines if "python" in line or re.search(r"[0-9a-f]{16}|nonce|\$\(", line)]


def test_who_follows_the_defaults_gives_no_worker_anything(walked):
    """What was signed and sealed: profiles that protect from any one worker, results for the data owner alone."""
    machines, outputs = walked
    for text in (_output(outputs, "job sign ../owner/job.json"), _output(outputs, "job propose")):
        assert re.search(r"profile +enclave\n", text) and "no worker takes part" in text
        for name in (
            "per_device_train_batch_size",
            "lora_r",
            "lora_target_modules",
            "num_train_epochs",
            "weight_decay",
        ):
            assert f"\n{name} " in text, "a setting is signed and not shown"
    for name, sealed in (("provider", "model"), ("owner", "data"), ("owner", "prompts")):
        terms = Terms.from_dict(read_header(machines.root / name / f"{sealed}.sealed").header.terms)
        assert terms.profiles and all(hides_all(profile_named(profile)) for profile in terms.profiles)
        assert {*terms.adapter_to, *terms.generations_to, *terms.queries_by} == {"owner"}
        assert len(terms.partners) == 1 and terms.workers == () and terms.expires != "never"


def test_a_job_that_was_deleted_leaves_no_sealed_file(walked):
    machines, outputs = walked
    assert "deleted" in _output(outputs, "job delete")
    assert [path for path in machines.kept if path.suffix == ".sealed"]
    assert not list((machines.root / "operator" / "state" / "store").rglob("*.sealed"))


def _ask_through_connect(machines: Machines, generate: str) -> dict[str, Any]:
    """What the usual client gets of the job's model, before it is deleted."""
    options = machines.here(generate).split(" --prompt ")[0].split()[2:]
    command = [sys.executable, "-m", "obfuscatune", "connect", *options, "--port", "0"]
    with subprocess.Popen(  # noqa: S603
        command,
        cwd=machines.root / "owner",
        env=machines.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
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
                told = httpx2.get(f"{url}/job", headers={"Authorization": f"Bearer {token}"}).json()
        finally:
            process.terminate()
    return {"text": reply.choices[0].text, "prompt_tokens": reply.usage.prompt_tokens, **told}


def test_the_usual_client_asks_the_enclave_through_connect(walked):
    machines, outputs = walked
    asked = machines.asked
    assert asked["text"].strip() == _output(outputs, "generate --job").strip()
    assert asked["prompt_tokens"] > 3
    assert (asked["status"], asked["queries"]) == ("done", 1)  # what was asked before is still known


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
    kept = [*files, *machines.kept]  # the store as it was before the job was deleted
    assert sum(path.suffix == ".sealed" for path in kept) >= 7  # state, model, data, prompts, adapter, output, report
    for path in kept:
        assert not _found(canaries, path.read_bytes()), path


def test_no_traffic_between_the_parties_holds_a_plain_byte(walked):
    machines, _ = walked
    captured = bytes(machines.tap.captured)
    size = (machines.root / "provider" / "model.sealed").stat().st_size
    assert len(captured) > size, "the capture does not hold the upload of the model"
    assert not _found(_canaries(machines), captured)


def test_nothing_is_left_in_ram_directories_when_the_enclave_ends(walked):
    machines, _ = walked
    machines.stop("enclave")
    pids = {process.pid for process, _ in machines.readers}
    assert len(pids) >= 2  # the enclave that was killed, the one that went on
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
    job = json.loads((machines.root / "provider" / "job.json").read_text())["job"]
    assert job["model"] == read_header(machines.root / "provider" / "model.sealed").digest
    assert job["data"] == read_header(machines.root / "owner" / "data.sealed").digest
