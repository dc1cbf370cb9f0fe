"""A model is mapped from its file, not copied: a layer is read when it is keyed, and is never held twice."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from obfuscatune.training.loading import load_tokenizer

MEBIBYTE = 2**20
PROGRAM = """
import re, sys
from pathlib import Path
from obfuscatune.training.loading import load_model

def private_memory():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

load_model(sys.argv[1], "float32")  # the imports
before = private_memory()
model = load_model(sys.argv[1], "float32")
mapped = private_memory() - before
copies = [parameter.detach().clone() for parameter in model.parameters()]
print(mapped, private_memory() - before)
"""


@pytest.mark.slow
def test_loading_copies_no_weight(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=64, n_embd=512, n_layer=5, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path)
    size = model.num_parameters() * 4
    assert size > 60 * MEBIBYTE
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    mapped, copied = (int(number) for number in done.stdout.split())
    assert mapped < size / 4  # measured 0.1 MiB
    assert copied > size * 0.9  # the control: a copy shows


@pytest.mark.parametrize(
    ("added", "own", "expected"),
    [((), None, "<end>"), (("[PAD]",), None, "[PAD]"), (("[PAD]", "<no>"), "<no>", "<no>")],
)
def test_the_padding_token_is_another_than_the_end_where_there_is_one(
    added: tuple[str, ...], own: str | None, expected: str, new_tokenizer, tmp_path: Path
) -> None:
    tokenizer: PreTrainedTokenizerFast = new_tokenizer()
    tokenizer.add_tokens(list(added), special_tokens=True)
    tokenizer.pad_token = own
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), GPT2Config(vocab_size=300))
    assert (loaded.pad_token, loaded.eos_token, len(loaded)) == (expected, "<end>", len(tokenizer))
