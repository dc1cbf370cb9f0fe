"""tools/pretrain.py on a tiny text: two steps of each architecture, and what it writes."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parents[1] / "tools" / "pretrain.py"
SIZES = (
    "--vocab_size 300 --n_embd 32 --n_inner 48 --n_layer 2 --n_positions 16 --batch_size 4 --warmup_steps 1 "
    "--chat_template --max_steps 2"
)


@pytest.fixture(scope="module")
def pretrain() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pretrain", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(pretrain: ModuleType, directory: Path, patch: pytest.MonkeyPatch, name: str, *more: str) -> Path:
    text, output = directory / "text.txt", directory / name
    book = "The king went into the wood, and the wood was dark. "
    text.write_text(f"{book * 20}\n<|endoftext|>\n{book[::-1] * 40}\n<|endoftext|>\n{book * 40}")
    given = ["--text", str(text), "--output_dir", str(output), *SIZES.split(), *more]
    patch.setattr("sys.argv", ["pretrain.py", *given])
    pretrain.main()
    return output


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_two_steps_give_a_model_that_loads(
    pretrain: ModuleType, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = ("--architecture", architecture)
    first = run(pretrain, tmp_path, monkeypatch, "untrained", *chosen, "--max_minutes", "1e-9")
    assert "| 0 x 4 x 16 |" in (first / "README.md").read_text()  # no time, no step
    untrained = AutoModelForCausalLM.from_pretrained(first)

    output = run(pretrain, tmp_path, monkeypatch, "trained", *chosen)
    card = (output / "README.md").read_text()
    assert "| 2 x 4 x 16 |" in card and "pretrain.py --text text.txt " in card
    model, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.model_type == architecture
    before, after = untrained.state_dict(), model.state_dict()
    assert not any(torch.equal(before[name], after[name]) for name in after)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert len(tokenizer) <= 300 and tokenizer.chat_template
