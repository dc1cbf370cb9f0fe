"""The commands of "Two machines" in docs/deployment.md, run as they stand there, in two network namespaces."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

pytestmark = pytest.mark.slow
PAGE = Path(__file__).parents[2] / "docs" / "deployment.md"
HEADING = "## Two machines: enclave and worker"
ADDRESS = {"gpu": "10.87.0.1", "lab": "10.87.0.2"}
MEASURE = """import sys, pathlib
from tests.training.test_overlap import measure
measure(sys.argv[1], pathlib.Path(sys.argv[2]), width=128, insecure=True)"""


def end_of(machine: str) -> str:
    """Name of the machine's end of the link."""
    return f"ob{machine}{os.getpid() % 100000}"


def ip(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)  # noqa: S603, S607


@pytest.fixture
def namespaces() -> Iterator[dict[str, str]]:
    """Two namespaces by the machines' names, with a link between them; the commands' host names are their addresses."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    made = {name: f"obft-{name}-{os.getpid()}" for name in ADDRESS}
    ends = {name: end_of(name) for name in ADDRESS}
    with contextlib.ExitStack() as stack:
        for namespace in made.values():
            try:
                ip("netns", "add", namespace)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()[:80]}")
            stack.callback(ip, "netns", "del", namespace)
        first, second = ADDRESS
        ip("link", "add", ends[first], "netns", made[first], "type", "veth", "peer", "name", ends[second], "netns",
           made[second])  # fmt: skip
        for name, namespace in made.items():
            ip("-n", namespace, "addr", "add", f"{ADDRESS[name]}/24", "dev", ends[name])
            ip("-n", namespace, "link", "set", ends[name], "up")
            ip("-n", namespace, "link", "set", "lo", "up")
        yield made


def commands() -> list[tuple[str, list[str]]]:
    """Machine and words of each command line of the section's first block."""
    section = PAGE.read_text().split(HEADING)[1].split("\n## ")[0]
    block = section.split("```")[1]
    found = [
        match.groups() for match in re.finditer(r"^(\w+)\$ obfuscatune ([^#\n]*(?:#\S+[^#\n]*)?)", block, re.MULTILINE)
    ]
    return [(machine, words.split()) for machine, words in found]


@pytest.fixture
def run_yaml(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    """A small run, as ``--config`` takes it."""
    model = tmp_path / "model"
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=258, n_embd=24, n_layer=2, n_head=3, n_positions=64, bos_token_id=257, eos_token_id=256
    )
    GPT2LMHeadModel(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {i} is {i * i}"}) + "\n" for i in range(8)))
    lines = [f"model_name_or_path: {model}", f"train_file: {rows}", "output_dir: adapter", "max_steps: 2"]
    return "\n".join(lines) + "\n"


def test_the_commands_of_the_page(namespaces: dict[str, str], run_yaml: str, tmp_path: Path) -> None:
    homes = {name: tmp_path / name for name in ADDRESS}
    for home in homes.values():
        home.mkdir()
    (homes["lab"] / "run.yaml").write_text(run_yaml)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}

    def on(machine: str, words: list[str]) -> list[str]:
        return ["ip", "netns", "exec", namespaces[machine], sys.executable, "-m", "obfuscatune", *words]

    lines = commands()
    assert [words[0] for _, words in lines] == ["identity", "identity", "worker", "finetune"], lines
    with contextlib.ExitStack() as stack:
        shown = ""
        for machine, words in lines:
            home = homes[machine]
            if words[0] == "worker":
                shutil.copy(homes["lab"] / "lab.pub", home)  # carried across, as the page says
                words[words.index("--device") + 1] = "cpu"
                # bubblewrap makes a namespace of its own within this one, if it is there
                process = stack.enter_context(
                    subprocess.Popen(on(machine, words), cwd=home, env=environment, stdout=subprocess.PIPE, text=True)  # noqa: S603
                )
                stack.callback(process.terminate)
                assert process.stdout is not None
                shown = process.stdout.readline()
                assert shown.startswith("worker listening on tls://0.0.0.0:7000#"), shown
                continue
            if words[0] == "finetune":
                at = words.index("--worker") + 1
                fingerprint = shown.split("#")[1].split()[0]
                words[at] = (
                    words[at].replace("tls://gpu:", f"tls://{ADDRESS['gpu']}:").split("#")[0] + f"#{fingerprint}"
                )
            done = subprocess.run(  # noqa: S603
                on(machine, words), cwd=home, env=environment, capture_output=True, text=True, timeout=240
            )
            assert done.returncode == 0, done.stderr
    assert (homes["lab"] / "adapter" / "adapter_model.safetensors").is_file()
    assert not list(homes["gpu"].glob("lab.key")), "no secret half crosses"


def test_two_half_batches_over_1_ms_and_1_gbit(namespaces: dict[str, str], tmp_path: Path) -> None:
    """Steps a second with `--overlap` and without, over a link that the kernel makes slow; seen with `pytest -s`."""
    for machine, namespace in namespaces.items():
        slow = ["qdisc", "add", "dev", end_of(machine), "root", "netem", "delay", "500us", "rate", "1gbit"]
        made = subprocess.run(["tc", "-n", namespace, *slow], capture_output=True, text=True)  # noqa: S603, S607
        if made.returncode:
            pytest.skip(f"this kernel has no netem: {made.stderr.strip()[:80]}")
    where = f"tcp://{ADDRESS['gpu']}:7001"
    on = {machine: ["ip", "netns", "exec", namespace, sys.executable] for machine, namespace in namespaces.items()}
    listening = [*on["gpu"], "-m", "obfuscatune", "worker", "--listen", where, "--insecure"]
    with subprocess.Popen(listening, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        try:
            assert process.stdout is not None and where in process.stdout.readline()
            command = [*on["lab"], "-c", MEASURE, where, str(tmp_path)]
            done = subprocess.run(  # noqa: S603
                command, cwd=PAGE.parents[1], capture_output=True, text=True, timeout=240
            )
        finally:
            process.terminate()
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"[\d.]+ steps/s, with overlap [\d.]+ steps/s\n", done.stdout), done.stdout
    print(done.stdout)
