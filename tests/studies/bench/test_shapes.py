"""True shapes have the published numbers of parameters; what is written for them is a model that loads."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig

from obfuscatune.errors import UsageError
from obfuscatune.studies.bench.run import BenchOptions, count_steps, run_bench
from obfuscatune.studies.bench.shapes import NAMED, is_shape, layers_of, shape_config
from obfuscatune.studies.bench.synthetic import write_random_model
from obfuscatune.studies.bench.workloads import Shape

# Of the models' cards and files; a tied head counts once.
PUBLISHED = {
    "smollm-135m": 134_515_008,
    "smollm-360m": 361_821_120,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen3-0.6b": 596_049_920,
    "gemma-2-2b": 2_614_341_888,
    "phi-3-mini": 3_821_079_552,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
}


@pytest.mark.parametrize("name", NAMED)
def test_a_named_shape_has_the_published_number_of_parameters(name: str) -> None:
    config = shape_config(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]
    assert not any(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))


def tiny(directory: Path, **changes: object) -> Path:
    fields = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 3}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    fields |= {"attention_dropout": 0.1, "bos_token_id": 0, "eos_token_id": 0}
    LlamaConfig(**{**fields, **changes}).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("tied", [True, False])
def test_random_weights_are_a_model_that_loads(tmp_path: Path, tied: bool) -> None:
    config = shape_config(str(tiny(tmp_path / "given", tie_word_embeddings=tied)))
    assert config.attention_dropout == 0
    (tmp_path / "written").mkdir()
    write_random_model(config, "bfloat16", tmp_path / "written")
    shards = sorted((tmp_path / "written").glob("*.safetensors"))
    assert len(shards) == 3 + 1  # the blocks, and the rest
    with safe_open(shards[1], "pt") as shard:
        assert {name.rpartition(".layers.")[2][0] for name in shard.keys()} == {"0"}  # noqa: SIM118
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "written", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert all(p.float().std() > 0 for p in model.parameters())


def test_a_disk_without_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = shape_config(str(tiny(tmp_path / "given")))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(UsageError, match="no room"):
        write_random_model(config, "float32", tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_sizes_are_names_or_directories(tmp_path: Path) -> None:
    directory = str(tiny(tmp_path / "given"))
    shape = Shape(2, 8, 3)
    BenchOptions(sizes=("xl", "phi-3-mini", directory), shape=shape, dtype="bfloat16")
    assert (layers_of(directory), layers_of("llama-3.2-1b"), layers_of("xl")) == (3, 16, 48)
    assert is_shape("xl") and is_shape("qwen3-0.6b") and not is_shape(directory)
    with pytest.raises(UsageError, match="not one of tiny, small"):
        BenchOptions(sizes=("llama-9b",))
    with pytest.raises(UsageError, match="holds 64 tokens, not the 128"):
        BenchOptions(sizes=(directory,))
    with pytest.raises(UsageError, match="no such shape"):
        shape_config("llama-9b")


@pytest.mark.slow
def test_a_directory_is_measured(tmp_path: Path) -> None:
    directory = str(tiny(tmp_path / "given"))
    options = BenchOptions(
        sizes=(directory,),
        profiles=("balanced",),
        workloads=("memory", "lora_step"),
        shape=Shape(2, 8, 3),
        repetitions=1,
        threads=1,
        dtype="bfloat16",
    )
    steps: list[str] = []
    result = run_bench(options, steps.append)
    (measured,), (footprint,) = result.measurements, result.footprints
    assert measured.workload == "lora_step"
    assert measured.calls == 2 * 2 * 3  # forward and backward, attention and MLP, blocks
    assert footprint.enclave_share < 1 and footprint.worker_peak_bytes is not None
    assert [step for step in steps if "untimed" in step] == [
        f"{directory} balanced: {name}, untimed" for name in ("prefill", "decode")
    ]
    assert len(steps) == count_steps(options)
