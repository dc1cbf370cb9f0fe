"""The examples, and the README's snippet, as a user runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from obfuscatune.studies.bundled import model_directory
from obfuscatune.studies.bundled.records import company_records

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path) -> str:
    # The examples call `obfuscatune` as an installed package has it.
    tools = cwd / "bin"
    tools.mkdir()
    script = tools / "obfuscatune"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m obfuscatune "$@"\n')
    script.chmod(0o755)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PATH": f"{tools}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)  # noqa: S603
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def loads(adapter: Path, family: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(model_directory(family))
    assert set(PeftModel.from_pretrained(base, adapter).peft_config) == {"default"}


@pytest.mark.parametrize(("script", "family"), [("finetune_trainer.py", "gpt2"), ("sft_trl.py", "llama")])
def test_a_script(script: str, family: str, tmp_path: Path) -> None:
    said = run(sys.executable, ROOT / "examples" / script, tmp_path / "out", cwd=tmp_path)
    losses = [float(loss) for loss in re.findall(r"'loss': '?([0-9.e-]+)", said)]
    assert len(losses) == 4 and losses[-1] < losses[0] / 2
    assert "in the enclave in the clear" in said
    loads(tmp_path / "out" / "adapter", family)


def test_two_machines(tmp_path: Path) -> None:
    said = run("bash", ROOT / "examples" / "two_machines.sh", tmp_path / "out", cwd=tmp_path)
    assert "worker listening on tls://127.0.0.1:" in said
    loads(tmp_path / "out" / "lab" / "adapter", "gpt2")
    assert not list((tmp_path / "out" / "gpu").glob("lab.key")), "no secret half crosses"


def test_the_readme(tmp_path: Path) -> None:
    """Its snippet as it stands, with a bundled model for GPT-2, four steps, and rows."""
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    tokenizer = AutoTokenizer.from_pretrained(model_directory())
    records, _ = company_records(0, 16)
    rows = []
    for record in records[:8]:
        tokens = tokenizer(record["prompt"] + record["completion"])["input_ids"]
        rows.append({"input_ids": tokens[:12], "labels": tokens[:12]})
    for old, new in (('"gpt2"', repr(str(model_directory()))), ("max_steps=100", "max_steps=4, use_cpu=True")):
        assert old in snippet
        snippet = snippet.replace(old, new)
    script = tmp_path / "snippet.py"
    rows = [{name: tokens + tokens[-1:] * (12 - len(tokens)) for name, tokens in row.items()} for row in rows]
    script.write_text(f"rows = {rows!r}\n{snippet}")
    assert "in the enclave in the clear" in run(sys.executable, script, cwd=tmp_path)
    loads(tmp_path / "adapter", "gpt2")
