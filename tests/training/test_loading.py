"""A model is mapped from its file, not copied: a layer is read when it is keyed, and is never held twice."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
)

from obfuscatune.cli.inspect import examine
from obfuscatune.enclave.protect import protect
from obfuscatune.errors import UnsupportedModelError, UsageError
from obfuscatune.training.loading import load, load_adapter, load_adapters, load_config, load_model, load_tokenizer

TINY = {
    "vocab_size": 64,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
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


def test_an_adapter_that_does_not_fit_or_is_not_finite_is_refused(tmp_path: Path) -> None:
    def new(layers: int) -> GPT2LMHeadModel:
        return GPT2LMHeadModel(GPT2Config(**{**TINY, "n_layer": layers}))

    adapter = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    get_peft_model(new(2), adapter).save_pretrained(tmp_path)
    load_adapter(new(2), str(tmp_path))
    with pytest.raises(UsageError, match=r"the adapter does not fit: got 2 missing tensors: .*h.2.attn"):
        load_adapter(new(3), str(tmp_path))
    with pytest.raises(UsageError, match=r"the adapter does not fit: got 2 unexpected tensors: .*h.1.attn"):
        load_adapter(new(1), str(tmp_path))
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, path)
    with pytest.raises(UsageError, match="the adapter is not finite"):
        load_adapter(new(2), str(tmp_path))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "NOPE"}')
    with pytest.raises(UsageError, match="cannot load the adapter"):
        load_adapter(new(2), str(tmp_path))


def test_a_directory_without_an_adapter_is_named_so(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=5, n_embd=8, n_layer=1, n_head=2))
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "adapter_config.json").write_text("{}")
    for name, message in (("nowhere", "no such adapter directory"), ("half", "no adapter in the directory")):
        with pytest.raises(UsageError, match=f"{message}: expected adapter_config.json"):
            load_adapter(model, str(tmp_path / name))


def test_an_adapter_of_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    llama = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    other = get_peft_model(LlamaForCausalLM(llama), LoraConfig(r=2, target_modules=["q_proj"]))
    other.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UsageError, match="the adapter does not fit: got no layer that it names"):
        load_adapter(GPT2LMHeadModel(GPT2Config(**TINY)), str(tmp_path / "adapter"))


def test_an_adapter_that_is_nowhere_is_named_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"no directory of that name, and nothing found on the hub \(at nosuch\)"):
        load_adapter(GPT2LMHeadModel(GPT2Config(**TINY)), "nosuch")


@pytest.mark.parametrize("name", ["runs/adaptor", "runs/a/b", "a/b/c", "./adaptor"])
def test_a_misspelt_directory_is_not_asked_for_on_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is a third party, and would be asked for minutes."""
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("asked"))
    monkeypatch.setattr("peft.PeftConfig.from_pretrained", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(UsageError, match="no such adapter directory"):
        load_adapter(GPT2LMHeadModel(GPT2Config(**TINY)), name)
    with pytest.raises(UsageError, match=f"no such model directory: got {name}") as caught:
        load_config(name)
    assert ("the folder runs is here" in str(caught.value)) == (name == "runs/adaptor")


def test_an_adapter_in_a_pickle_is_refused(tmp_path: Path) -> None:
    def new() -> GPT2LMHeadModel:
        return GPT2LMHeadModel(GPT2Config(**TINY))

    adapted = get_peft_model(new(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    adapted.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    torch.save(tensors, tmp_path / "adapter_model.bin")
    load_adapter(new(), str(tmp_path))  # PEFT takes the safetensors
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"the adapter is a pickle: got adapter_model.bin"):
        load_adapter(new(), str(tmp_path))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_that_takes_its_start_out_of_the_base_is_refused(start: str, tmp_path: Path) -> None:
    """The base's weights are not read yet, so PEFT could not change them as it does where they are."""
    GPT2LMHeadModel(GPT2Config(**TINY)).save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    for name, kind in (("adapter", start), ("plain", True)):
        config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=kind)
        get_peft_model(load_model(base, "float32"), config).save_pretrained(tmp_path / name)
    message = rf"change the model's own weights: got init_lora_weights '{start}'.*path_initial_model"
    with pytest.raises(UsageError, match=f"(?s){message}"):
        load_adapter(load(base), str(tmp_path / "adapter"))
    with pytest.raises(UsageError, match=f"(?s){message}"):
        load_adapters(load(base), {"one": str(tmp_path / "plain"), "two": str(tmp_path / "adapter")})
    load_adapter(load_model(base, "float32"), str(tmp_path / "adapter"))


def test_a_model_in_the_clear_is_not_filled_up_at_random(tmp_path: Path, new_tokenizer) -> None:
    model = GPT2LMHeadModel(GPT2Config(**TINY))
    model.save_pretrained(tmp_path)
    load_model(str(tmp_path), "float32")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["transformer.h.1.ln_1.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"the model does not fit: got 1 missing tensors: transformer.h.1.ln_1.weight"):
        load_model(str(tmp_path), "float32")


SIZES = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
NOT_UNDERSTOOD = {
    "experts": MixtralConfig(**SIZES, intermediate_size=8, num_key_value_heads=2, num_local_experts=2),
    "linear layers of their own": FalconConfig(**SIZES, new_decoder_architecture=True),
    "no attention": MambaConfig(vocab_size=37, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=2),
}


@pytest.mark.filterwarnings("ignore:The fast path")
@pytest.mark.parametrize("kind", NOT_UNDERSTOOD)
def test_what_only_the_enclave_runs_is_loaded_whole_and_refused_early_elsewhere(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(NOT_UNDERSTOOD[kind]).save_pretrained(tmp_path)
    stock, ids = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), torch.arange(12).reshape(2, 6)
    for named in ({}, {"profile": "enclave"}):
        with protect(load(tmp_path, **named), profile="enclave") as protected, torch.no_grad():
            assert torch.equal(protected.model(ids).logits, stock(ids).logits)
    with pytest.raises(UnsupportedModelError, match='profile="enclave" runs a model as it is'):
        protect(load(tmp_path), profile="paper")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "layers.1." in name or "h.1." in name)
    for changed, message in (
        ({key: tensor for key, tensor in tensors.items() if key != name}, "do not fit|is missing"),
        ({**tensors, "extra.weight": torch.zeros(3)}, "not of this model: got extra.weight"),
        ({**tensors, name: tensors[name] * float("nan")}, f"a weight is not finite .at {re.escape(name)}"),
        ({**tensors, name: torch.zeros(3)}, "do not fit"),
    ):
        save_file(changed, path, metadata={"format": "pt"})
        with pytest.raises(UnsupportedModelError, match=message):
            load(tmp_path)
        with pytest.raises(UnsupportedModelError, match="runs a model as it is"):  # and no weight is read
            load(tmp_path, profile="paper")


@pytest.mark.parametrize("rows", [100, 257, 516, 5000])
def test_a_tokenizer_of_another_model_is_refused(rows: int, new_tokenizer, tmp_path: Path) -> None:
    new_tokenizer().save_pretrained(tmp_path)  # of 258 tokens
    with pytest.raises(UsageError, match=f"tokenizer of another model: got 258 tokens, expected .* {rows}, "):
        load_tokenizer(str(tmp_path), GPT2Config(vocab_size=rows))


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


def test_a_special_token_of_pictures_may_be_beyond_the_embedding(new_tokenizer, tmp_path: Path) -> None:
    """As Gemma 3's tokenizer has one beside a model of texts; the token that ends a text may not be there."""
    tokenizer: PreTrainedTokenizerFast = new_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_tokens(["<picture>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    assert len(load_tokenizer(str(tmp_path), GPT2Config(vocab_size=rows))) == rows + 1
    with pytest.raises(UsageError, match="tokenizer of another model"):
        load_tokenizer(str(tmp_path), GPT2Config(vocab_size=rows - 1))


LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# What a file may say that no model can have: transformers fails at it in a dozen ways. Fields, and what we say.
IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "a width in words": ({"hidden_size": "wide"}, "configuration: got hidden_size"),
    "a broken width": ({"hidden_size": 24.5}, "configuration: got hidden_size"),
    "a negative width": ({"hidden_size": -24}, "RuntimeError"),
    "no heads": ({"num_attention_heads": 0}, "ZeroDivisionError"),
    "heads that do not divide the width": ({"num_attention_heads": 5}, "got validate_architecture"),
    "kv heads that do not divide the heads": ({"num_key_value_heads": 3}, "share no kv heads evenly: got 4 and 3"),
    "heads of no width": ({"head_dim": 0}, "ZeroDivisionError"),
    "an odd width to be rotated": ({"head_dim": 5}, "got validate_rope"),
    "no layers": ({"num_hidden_layers": 0}, "no decoder blocks"),
    "no layers to be discovered": ({"model_type": "olmo2", "num_hidden_layers": 0}, "blocks cannot be found"),
    "a list of kinds that fills the memory": ({"model_type": "qwen2", "num_hidden_layers": 10**10}, "at most 4096"),
    "another such list": (
        {"model_type": "gpt_neo", "attention_types": [[["global"], 10**10]]},
        r"layers in the model's configuration: got 10000000000",
    ),
    "an unknown activation": ({"hidden_act": "magic"}, "KeyError"),
    "an unknown scaling": ({"rope_scaling": {"rope_type": "magic", "factor": 2.0}}, "KeyError"),
    "half a scaling": ({"rope_scaling": {"rope_type": "yarn"}}, "configuration: got KeyError"),
    "a scaling that is none": ({"rope_scaling": "x"}, "got rope_parameters"),
    "an unknown kind of layer": ({"model_type": "qwen2", "layer_types": ["x", "x"]}, "got validate_layer_type"),
    "kinds of fewer layers": ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "got validate_layer_type"),
    "a padding token beyond all": ({"pad_token_id": 99}, "AssertionError"),
    "an unknown dtype": ({"dtype": "magic"}, "configuration: got AttributeError"),
    "an unknown quantization": ({"quantization_config": "x"}, "configuration: got AttributeError"),
    "an unknown kind of model": ({"model_type": "magic"}, "configuration: got ValueError"),
    "code of attention by its name": ({"_attn_implementation": "somebody/kernel"}, "attention of the model's"),
    "a model of pictures": (
        {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}},
        "takes pictures or sounds besides text: got model_type 'gemma3', around 'gemma3_text'",
    ),
    "another model of pictures": ({"model_type": "llava"}, "takes pictures or sounds besides text: got .*'llava'"),
}


@pytest.mark.parametrize(("fields", "said"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_an_impossible_configuration_is_refused(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **fields}))
    with pytest.raises((UsageError, UnsupportedModelError), match=said):
        examine(load_config(str(tmp_path)), "float32")


@pytest.mark.parametrize("content", ["[1]", "null", "{", "{}", "\xff"])
def test_a_file_that_is_no_configuration_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(UsageError, match="cannot load the model's configuration"):
        load_config(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert examine(load_config(str(tmp_path)), "float32")["heads"] == 4  # the control
