"""A model that no worker can have a part of, here one of experts, is taught and used where everything stays inside."""

import json
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from obfuscatune.profiles import resolve
from obfuscatune.serving.models import serve_model

from .conftest import Run


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    directory = tmp_path_factory.mktemp("experts")
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    config = MixtralConfig(**sizes, **heads, max_position_embeddings=64, bos_token_id=257, eos_token_id=256)
    MixtralForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_every_verb_runs_it_inside(experts: Path, train_file: Path, tmp_path: Path, run: Run) -> None:
    model, adapter = ("--model_name_or_path", experts), tmp_path / "adapter"
    inside = (*model, "--profile", "enclave")
    outcome = run("finetune", *inside, "--train_file", train_file, "--output_dir", adapter, "--max_steps", 2)
    assert outcome.code == 0, outcome.err
    outcome = run("generate", *inside, "--adapter_name_or_path", adapter, "--prompt", "row", "--max_new_tokens", 3)
    assert outcome.code == 0, outcome.err
    row = {"question": "1?", "choices": ["blue", "red", "old", "new"], "answer": 1, "support": ""}
    (tmp_path / "sciq").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "sciq" / f"{split}.jsonl").write_text(json.dumps({"id": split, **row}) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.utils.setup_logging", lambda: None)  # its handler would keep a closed standard error
        outcome = run("evaluate", *inside, "--task", "sciq", "--data_dir", tmp_path)
    assert outcome.code == 0 and "acc_norm" in outcome.out, outcome.err
    protection = {"profile": resolve("enclave")}
    with serve_model(str(experts), "float32", {"own": str(adapter)}, protection, None) as served:
        assert served.names == ("base", "own")


@pytest.mark.parametrize("verb", ["generate", "finetune", "serve"])
def test_any_other_profile_refuses_it_before_its_weights_are_read(
    verb: str, experts: Path, train_file: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("obfuscatune.training.directory.DirectoryTensors.get", lambda *_: pytest.fail("read"))
    more = {
        "generate": ("--prompt", "row"),
        "finetune": ("--train_file", train_file, "--output_dir", tmp_path / "adapter"),
        "serve": ("--port", "0"),
    }
    outcome = run(verb, "--model_name_or_path", experts, "--profile", "paper", *more[verb])
    assert outcome.code == 2 and "not those of a linear layer" in outcome.err
    assert 'profile="enclave" runs a model as it is' in outcome.err and not (tmp_path / "adapter").exists()
