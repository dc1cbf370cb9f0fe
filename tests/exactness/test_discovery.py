"""Decoders without a record: what is found in them, that it runs exactly, and what is refused for what it is."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BambaConfig,
    BartConfig,
    BloomConfig,
    Cohere2Config,
    CTRLConfig,
    DeepseekV32Config,
    Emu3ForCausalLM,
    Emu3TextConfig,
    FalconConfig,
    FalconH1Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPTJConfig,
    GPTNeoConfig,
    GptOssConfig,
    Lfm2Config,
    Lfm3Config,
    Mamba2Config,
    MambaConfig,
    MllamaForCausalLM,
    MusicgenDecoderConfig,
    MusicgenForCausalLM,
    NemotronHConfig,
    OlmoHybridConfig,
    OpenAIGPTConfig,
    OPTConfig,
    PhiConfig,
    Qwen3_5Config,
    Qwen3_5TextConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
    XmodConfig,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from obfuscatune import UnsupportedModelError
from obfuscatune.cli import main
from obfuscatune.enclave.families import layer_names
from obfuscatune.enclave.remote.linear import RemoteLinear
from obfuscatune.training.loading import load

from .families import COMMON, SQUARE, adapted, randomize, wide
from .models import error, gradients, scalar, tokens, worst

EXACT = 1e-9  # float64; measured 5.5e-14
LOGITS_FLOAT32 = 1e-5  # measured 1.8e-6
LOGITS_NAIVE = 5e-3  # its keys amplify rounding errors; measured 6.7e-4
MONARCH = {"key_block": 4}
SMALL = {"vocab_size": 37, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}

# Configuration, and how many layers travel in each call of a block.
FOUND: dict[str, tuple[Callable[[], Any], list[int]]] = {
    # Embeddings of another width, with linear layers outside the blocks, and blocks at another path.
    "opt": (
        lambda: OPTConfig(
            **SMALL, hidden_size=24, ffn_dim=20, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=12,
            max_position_embeddings=64, dropout=0.0,
        ),
        [3, 1, 1, 1],
    ),
    # One layer that attends to all tokens, one with a window; layers without biases beside layers with.
    "gpt_neo": (
        lambda: GPTNeoConfig(
            vocab_size=37, hidden_size=24, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
            window_size=4, max_position_embeddings=64, attention_dropout=0.0, embed_dropout=0.0, resid_dropout=0.0,
        ),
        [3, 1, 1, 1],
    ),
    # Attention and MLP of the same norm; positions that are rotated in pairs of neighbours.
    "gptj": (
        lambda: GPTJConfig(
            vocab_size=37, n_embd=24, n_layer=2, n_head=3, rotary_dim=4, n_positions=64, attn_pdrop=0.0, embd_pdrop=0.0,
            resid_pdrop=0.0,
        ),
        [4, 1, 1],
    ),
    # Which takes neither a mask that is made already nor none.
    "openai-gpt": (
        lambda: OpenAIGPTConfig(
            vocab_size=37, n_embd=24, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.0, embd_pdrop=0.0,
            resid_pdrop=0.0,
        ),
        [1, 1, 1, 1],
    ),
    "phi": (lambda: PhiConfig(**{**COMMON, "hidden_size": 32}), [4, 1, 1]),
    "gemma": (lambda: GemmaConfig(**SQUARE, head_dim=6), [3, 1, 2, 1]),
    "cohere2": (lambda: Cohere2Config(**SQUARE, **WINDOWS), [5, 1, 1]),
}  # fmt: skip
LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
NARROW = {**COMMON, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3}
STATES = {"hidden_size": 48, "num_hidden_layers": 2, "chunk_size": 4}
# Attention beside or between linear attention, short convolutions or a state space, whose own numbers stay here.
HYBRIDS: dict[str, Callable[[], Any]] = {
    "qwen3_5_text": lambda: Qwen3_5TextConfig(
        **NARROW, **LINEAR, head_dim=8, linear_num_value_heads=4,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
    "falcon_h1": lambda: FalconH1Config(
        **NARROW, head_dim=8, mamba_d_ssm=48, mamba_n_heads=6, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=4
    ),
    "recurrent_gemma": lambda: RecurrentGemmaConfig(
        **{**NARROW, "intermediate_size": 512}, lru_width=48, attention_window_size=4,
        block_types=["recurrent", "attention", "recurrent"],
    ),
    "mamba2": lambda: Mamba2Config(**SMALL, **STATES, num_heads=12, head_dim=8, state_size=8, n_groups=2),
    "lfm2": lambda: Lfm2Config(**NARROW, full_attn_idxs=[1]),
    "lfm3": lambda: Lfm3Config(**NARROW, layer_types=["conv", "full_attention", "conv"]),
    "olmo_hybrid": lambda: OlmoHybridConfig(
        **NARROW, **LINEAR, linear_num_value_heads=2,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
    "nemotron_h": lambda: NemotronHConfig(
        **{**NARROW, "num_hidden_layers": 4}, head_dim=8, layers_block_type=["mamba", "attention", "mlp", "mamba"],
        mamba_num_heads=12, mamba_head_dim=8, ssm_state_size=8, n_groups=2, chunk_size=4,
    ),
    "bamba": lambda: BambaConfig(
        **NARROW, mamba_n_heads=12, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=4, attn_layer_indices=[1]
    ),
}  # fmt: skip
# Parts of larger models, for whose configurations `AutoModelForCausalLM` has no class.
PARTS: dict[str, Callable[[], Any]] = {
    "emu3": lambda: Emu3ForCausalLM(Emu3TextConfig(**SQUARE)),
    "mllama": lambda: MllamaForCausalLM(MllamaTextConfig(**SQUARE, cross_attention_layers=[])),
}
QUICK = ("qwen3_5_text", "falcon_h1", "recurrent_gemma")
STOCK_FLOAT32 = {
    # Whose stock masks are not finite in float64.
    "bloom": lambda: BloomConfig(**SMALL, hidden_size=24, n_layer=2, n_head=4, hidden_dropout=0.0),
    # Whose recurrence is in float32, and whose weights are not rescaled as they would be by default.
    "rwkv": lambda: RwkvConfig(vocab_size=37, hidden_size=24, num_hidden_layers=2, rescale_every=0),
}


def model_of(config: Any, dtype: torch.dtype = torch.float64) -> Any:
    return randomize(AutoModelForCausalLM.from_config(config).to(dtype).eval())


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, :3] = 0
    return tokens(2, 9), mask


@pytest.mark.parametrize("profile", ["paper", "strict"])
@pytest.mark.parametrize("name", FOUND)
def test_what_is_found_runs_exactly(protect: Any, name: str, profile: str) -> None:
    make, together = FOUND[name]
    reference = adapted(model_of(make()))
    model = copy.deepcopy(reference)
    ids, mask = batch()
    prompt = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with protect(model, profile=profile, lora_placement="enclave", **(MONARCH if profile == "strict" else {})) as run:
        layers = [module for module in run.model.modules() if isinstance(module, RemoteLinear)]
        counts = {id(layer.group): len(layer.group.widths) for layer in layers}
        assert sorted(counts.values()) == sorted(together * 2)
        before = _calls(run)
        results = []
        for each in (reference, run.model):
            logits = each(input_ids=ids, attention_mask=mask).logits[mask.bool()]
            if each is run.model:
                assert _calls(run) - before == 2 * len(together)
            scalar(logits).backward()
            results.append({"logits": logits.detach(), **gradients(each)})
        assert torch.equal(run.model.generate(**prompt), reference.generate(**prompt))
    assert len(results[0]) > 12
    assert worst(results[1], results[0]) < EXACT


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in HYBRIDS]
)
def test_hybrids_run_exactly(protect: Any, name: str) -> None:
    plain = model_of(HYBRIDS[name]())
    reference = adapted(copy.deepcopy(plain), target_modules=layer_names(plain))
    ids, mask = batch()
    prompt = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with protect(copy.deepcopy(reference), profile="strict", **MONARCH) as run:
        left = [name for name, module in run.model.named_modules() if isinstance(module, RemoteLinear)]
        assert len(left) == sum(isinstance(module, nn.Linear) for module in plain.modules()) - 1  # but the head
        results = []
        for each in (reference, run.model):
            logits = each(input_ids=ids, attention_mask=mask).logits[mask.bool()]
            scalar(logits).backward()
            results.append({"logits": logits.detach(), **gradients(each)})
        for beams in (1, 3):
            found = [each.generate(**prompt, num_beams=beams) for each in (run.model, reference)]
            assert torch.equal(*found)
    assert len(results[0]) > 4
    assert worst(results[1], results[0]) < EXACT


@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_a_larger_model_runs_exactly(protect: Any, name: str) -> None:
    reference = adapted(randomize(PARTS[name]().double().eval()))
    ids, mask = batch()
    prompt = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    results = []
    with protect(copy.deepcopy(reference), profile="strict", **MONARCH) as run:
        for each in (reference, run.model):
            logits = each(input_ids=ids, attention_mask=mask).logits[mask.bool()]
            scalar(logits).backward()
            results.append({"logits": logits.detach(), **gradients(each)})
        assert torch.equal(run.model.generate(**prompt), reference.generate(**prompt))
    assert len(results[0]) > 2 * 2 * 7
    assert worst(results[1], results[0]) < EXACT


def test_a_layer_that_has_a_number_for_a_name_is_no_name_of_a_block() -> None:
    """CTRL's MLP is a ``Sequential``, whose ``0`` PEFT found in the list of blocks too, and refused the block."""
    model = model_of(CTRLConfig(vocab_size=37, n_embd=24, dff=20, n_layer=2, n_head=4, n_positions=64))
    assert layer_names(model) == ["Wk", "Wq", "Wv", "dense", "ffn.0", "ffn.2"]
    adapters = [name for name, module in adapted(model).named_modules() if isinstance(module, LoraLayer)]
    assert len(adapters) == 2 * 6
    named = adapted(model_of(model.config), target_modules=layer_names(model))
    assert [name for name, module in named.named_modules() if isinstance(module, LoraLayer)] == adapters


def test_training_that_takes_a_weight_itself_is_refused(protect: Any) -> None:
    model = adapted(model_of(HYBRIDS["mamba2"]()), target_modules=["in_proj"])
    with protect(model, profile="strict", **MONARCH) as run:
        with pytest.raises(UnsupportedModelError, match=r"weight.*layers\.0\.mixer\.out_proj"):
            run.model.train()(input_ids=tokens(2, 9))
        run.model.eval()(input_ids=tokens(2, 9))


@pytest.mark.parametrize("name", ["opt", "gptj"])
def test_dropout_of_lora_draws_when_the_plain_models_does(protect: Any, name: str) -> None:
    """OPT has k, v and q, and calls q first; GPT-J calls its MLP on the same rows, but after all of attention."""
    reference = adapted(model_of(FOUND[name][0]()), lora_dropout=0.4)
    model = copy.deepcopy(reference)
    with protect(model, profile="paper", lora_placement="split") as run:
        results = []
        for each in (reference, run.model):
            torch.manual_seed(3)
            logits = each.train()(tokens(2, 9)).logits
            scalar(logits).backward()
            results.append({"logits": logits.detach(), **gradients(each)})
            results[-1]["of evaluation"] = each.eval()(tokens(2, 9)).logits.detach()
    assert worst(results[1], results[0]) < EXACT
    assert error(results[0]["of evaluation"], results[0]["logits"]) > 1e-3


def _calls(protected: Any) -> int:
    traffic = protected.report().traffic
    return sum(traffic[name].calls for name in ("forward", "multiply") if name in traffic)


@pytest.mark.parametrize("profile", ["paper", "strict", "naive"])
@pytest.mark.parametrize("name", STOCK_FLOAT32)
def test_float32(protect: Any, name: str, profile: str) -> None:
    reference = model_of(STOCK_FLOAT32[name](), torch.float32)
    ids, mask = batch()
    with protect(copy.deepcopy(reference), profile=profile) as run, torch.no_grad():
        got, expected = (m(input_ids=ids, attention_mask=mask).logits[mask.bool()] for m in (run.model, reference))
    assert error(got, expected) < (LOGITS_NAIVE if profile == "naive" else LOGITS_FLOAT32)


def test_a_layer_that_another_calls_by_its_weight_is_refused(protect: Any) -> None:
    """BLOOM's slow form multiplies slices of ``dense.weight`` itself, and never calls the layer."""
    config = BloomConfig(**SMALL, hidden_size=24, n_layer=2, n_head=4, pretraining_tp=2, slow_but_exact=True)
    with pytest.raises(UnsupportedModelError, match=r"weight of a layer.*self_attention\.dense"):
        protect(model_of(config, torch.float32), profile="strict")


def _one_block_twice(model: Any) -> None:
    model.model.layers[1] = model.model.layers[0]


def _a_list_in_a_block(model: Any) -> None:
    model.model.layers[0].extra = nn.ModuleList([nn.Linear(24, 24)])


def _a_layer_that_was_added(model: Any) -> None:
    model.model.layers[0].extra = nn.Linear(24, 24)


def _a_tied_embedding(model: Any) -> None:
    model.model.layers[0].self_attn.o_proj.weight = model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_one_block_twice, r"a weight that two layers share"),
        (_a_list_in_a_block, r"a list of modules in a block.*layers\.0\.extra"),
        (_a_layer_that_was_added, r"architecture does not have.*layers\.0\.extra"),
        (_a_tied_embedding, r"a weight that two layers share: got model\.embed_tokens\.weight"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_a_configuration_does_not_say_is_refused(
    protect: Any, change: Callable[[Any], None], message: str
) -> None:
    model = AutoModelForCausalLM.from_config(GemmaConfig(**SQUARE, head_dim=6))
    change(model)
    with pytest.raises(UnsupportedModelError, match=message):
        protect(model, profile="strict")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: GptOssConfig(**SQUARE, head_dim=6, num_local_experts=2, sliding_window=4), r"mlp\.experts"),
        (
            lambda: MambaConfig(vocab_size=37, hidden_size=64, num_hidden_layers=2, state_size=4),
            r"weight of a layer.*mixer\.dt_proj",
        ),
        (lambda: RecurrentGemmaConfig(**NARROW), r"not those of a linear layer.*_gate_weight.*rg_lru"),
        (lambda: FalconConfig(**SMALL, hidden_size=24, num_attention_heads=3), r"kind that cannot be keyed.*Falcon"),
        (
            lambda: RwkvConfig(vocab_size=37, hidden_size=24, num_hidden_layers=2, rescale_every=1),
            r"weight of a layer.*blocks\.0\.attention\.output",
        ),
        (
            lambda: DeepseekV32Config(
                **{**SQUARE, "num_key_value_heads": 4},
                first_k_dense_replace=2,
                q_lora_rank=8,
                kv_lora_rank=8,
                qk_nope_head_dim=8,
                qk_rope_head_dim=4,
                v_head_dim=8,
                index_head_dim=8,
                index_n_heads=2,
                index_topk=4,
            ),
            r"weight of a layer.*layers\.0\.self_attn\.indexer\.weights_proj",
        ),
        (
            lambda: XmodConfig(
                **SMALL,
                hidden_size=24,
                intermediate_size=20,
                num_hidden_layers=2,
                num_attention_heads=4,
                is_decoder=True,
                languages=["en_XX"],
                default_language="en_XX",
            ),
            r"code looks at values of tensors.*at xmod",
        ),
        (
            lambda: BartConfig(
                **SMALL,
                d_model=24,
                encoder_layers=2,
                decoder_layers=2,
                decoder_attention_heads=4,
                decoder_ffn_dim=20,
                is_decoder=True,
                is_encoder_decoder=False,
            ),
            r"(?s)got 0 calls.*encoder_attn\.k_proj.*cross-attention",
        ),
    ],
    ids=[
        "experts",
        "a weight that other code multiplies by",
        "large weights of another kind",
        "a linear layer of its own class",
        "weights that are rescaled",
        "a weight whose dtype is asked for",
        "code that looks at values",
        "cross-attention",
    ],
)
def test_other_kinds_of_layers_are_refused_by_name(protect: Any, config: Callable[[], Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        protect(AutoModelForCausalLM.from_config(config()), profile="strict")


def test_why_a_model_cannot_be_run_without_data_is_told(protect: Any) -> None:
    """MusicGen's decoder takes four rows of tokens for one of a batch."""
    config = MusicgenDecoderConfig(
        vocab_size=37, hidden_size=24, ffn_dim=20, num_hidden_layers=2, num_attention_heads=4
    )
    with pytest.raises(
        UnsupportedModelError, match=r"by running it: got RuntimeError: shape '\[-1, 4, 4\]' is invalid"
    ):
        protect(MusicgenForCausalLM(config), profile="strict")


@pytest.mark.parametrize("profile", ["balanced", "strict"])
def test_the_language_model_of_a_model_of_pictures(protect: Any, profile: str) -> None:
    """As docs/models.md has it; the whole is refused."""
    text = Gemma3TextConfig(**SQUARE, head_dim=6, query_pre_attn_scalar=7, **WINDOWS)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    vision = {"model_type": "siglip_vision_model", **sizes, "image_size": 8, "patch_size": 2}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=36)
    whole = randomize(AutoModelForImageTextToText.from_config(config).double().eval())
    with pytest.raises(UnsupportedModelError, match=r"pictures or sounds besides text: got model_type 'gemma3'"):
        protect(whole, profile=profile)
    model = AutoModelForCausalLM.from_config(whole.config.text_config, dtype=whole.dtype)
    model.model, model.lm_head = copy.deepcopy(whole.model.language_model), copy.deepcopy(whole.lm_head)
    ids, mask = batch()
    with wide(), warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message=".*normalized in each head")
        with protect(model.eval(), profile=profile, **MONARCH) as run:
            got, expected = (m(input_ids=ids, attention_mask=mask).logits[mask.bool()] for m in (run.model, whole))
    assert error(got, expected) < EXACT


def test_a_model_of_pictures_of_which_stock_loading_takes_the_texts(protect: Any, tmp_path: Path) -> None:
    text = Qwen3_5TextConfig(
        **NARROW,
        **LINEAR,
        head_dim=8,
        linear_num_value_heads=4,
        layer_types=["linear_attention", *["full_attention"] * 2],
    ).to_dict()
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 48}
    whole = (
        AutoModelForImageTextToText.from_config(Qwen3_5Config(text_config=text, vision_config=vision)).double().eval()
    )
    randomize(whole).save_pretrained(tmp_path)
    model = load(tmp_path, "float64", "strict")
    with protect(model, profile="strict", **MONARCH) as run, torch.no_grad():
        assert not any("visual" in name for name, _ in run.model.named_modules())
        got, expected = (each(input_ids=tokens(2, 9)).logits for each in (run.model, whole))
    assert error(got, expected) < EXACT
    (tmp_path / "config.json").write_text(
        json.dumps({**whole.config.to_dict(), "quantization_config": {"quant_method": "fp8"}})
    )
    with pytest.raises(UnsupportedModelError, match="quantized"):
        load(tmp_path, profile="strict")


def test_inspect_says_what_was_found(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    FOUND["gptj"][0]().save_pretrained(tmp_path)
    capfd.readouterr()
    assert main(["inspect", "--model_name_or_path", str(tmp_path), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["family"], found["record"], found["blocks"], found["width"]) == ("gptj", False, 2, 24)
    calls = ["attn.k_proj + attn.v_proj + attn.q_proj + mlp.fc_in", "attn.out_proj", "mlp.fc_out"]
    assert found["calls"] == [{"blocks": [0, 1], "calls": calls}]
    refused = {row["profile"] for row in found["profiles"] if "refused" in row}
    assert refused == {"plain", "balanced", "stream"}
    assert main(["inspect", "--model_name_or_path", str(tmp_path)]) == 0
    out = capfd.readouterr().out
    assert "attn.q_proj + mlp.fc_in; attn.out_proj" in out and "balanced cannot run this model" in out
