"""Options of LoRA, of generation and of the Trainer: each is known, and is equal to the plain model's or refused."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3MoeConfig, Trainer, TrainingArguments

import obfuscatune
from obfuscatune import UnsupportedModelError, UsageError
from obfuscatune.enclave.families.options import KNOWN

from .conftest import listening
from .families import SQUARE, adapted, model_of, randomize
from .models import error, gradients, randomize_lora, scalar, tokens, twins, worst
from .options import GENERATION, LORA, TRAINING

EXACT = 1e-9  # float64, relative; measured 1e-12
TRAINED = 1e-7  # LoRA weights after two steps of AdamW from zero, which magnify rounding; measured 4e-10
BFLOAT16 = 0.1  # two steps of AdamW from gradients that both round, each in its way; measured 3.2e-2
SHARES = 1e-4  # of `shared`; measured 2e-6
PROFILES = ["balanced", *(pytest.param(profile, marks=pytest.mark.slow) for profile in ("stream", "strict"))]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("there", "known"),
    [
        ({field.name for field in fields(LoraConfig)}, LORA),
        (set(GenerationConfig().to_dict()) | set(vars(GenerationConfig())), GENERATION),
        ({field.name for field in fields(TrainingArguments)}, TRAINING),
    ],
    ids=["LoraConfig", "GenerationConfig", "TrainingArguments"],
)
def test_every_option_of_this_version_is_known(there: set[str], known: dict[str, str]) -> None:
    """A new one: look at what it does to a protected model, and put it into its table, with a case if it computes."""
    assert there == set(known), "options to look at, and ones that have gone"


def test_what_protect_lets_pass_is_what_the_table_says() -> None:
    assert {name for name, what in LORA.items() if what != "refused"} == KNOWN


# LoRA. Values of options that are equal: (options, whether protect warns)

EQUAL: list[dict[str, Any]] = [
    {"r": 2, "lora_alpha": 7, "use_rslora": True},
    {"rank_pattern": {"c_attn": 5}, "alpha_pattern": {"c_fc": 9}},
    {"exclude_modules": ["c_fc"], "init_lora_weights": "gaussian"},
    {"layers_to_transform": [1], "layers_pattern": "h"},
    {"modules_to_save": ["lm_head"]},
    {"trainable_token_indices": {"wte": [1, 2]}},
    {"target_modules": r"transformer\.h\.\d\.mlp\.c_fc"},
]
REFUSED: list[dict[str, Any]] = [
    {"use_dora": True},
    {"lora_bias": True},
    {"alora_invocation_tokens": [3], "task_type": "CAUSAL_LM"},
    {"layer_replication": [(0, 2), (1, 2)], "target_modules": ["q_proj"], "fan_in_fan_out": False},  # not of GPT-2
    {"target_parameters": ["mlp.up_proj.weight"], "target_modules": ["q_proj"], "fan_in_fan_out": False},
]


def adapted_with(**options: Any) -> Any:
    base = model_of("llama" if "q_proj" in options.get("target_modules", ()) else "gpt2", lora=False)
    config = LoraConfig(**{"r": 3, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, **options})
    model = get_peft_model(base, config).to(torch.float64).eval()
    randomize_lora(model, seed=1)
    return model


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("options", EQUAL, ids=lambda options: "-".join(options))
def test_options_of_lora_that_are_equal(protect: Callable[..., Any], profile: str, options: dict[str, Any]) -> None:
    reference = adapted_with(**options)
    model = copy.deepcopy(reference)
    with protect(model, profile=profile, key_block=4) as protected:
        for each in (reference, protected.model):
            scalar(each(tokens(2, 6)).logits).backward()
        assert worst(gradients(protected.model), gradients(reference)) < EXACT


@pytest.fixture
def everywhere(protect: Callable[..., Any], second_worker: str, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Protect a model under any profile, by as many workers as it needs."""
    with contextlib.ExitStack() as stack:
        three: list[str] = []

        def protected(model: Any, profile: str) -> Any:
            if profile != "shared":
                return protect(model, profile=profile)
            three[:] = three or [protect.keywords["worker"], second_worker, stack.enter_context(listening(tmp_path))]
            return protect(model, profile=profile, worker=three)

        yield protected


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["plain", "naive", "paper", "shared", "enclave"])
def test_options_of_lora_under_the_other_profiles(everywhere: Callable[..., Any], profile: str) -> None:
    for options in EQUAL:
        reference = adapted_with(**options)
        with everywhere(copy.deepcopy(reference), profile) as protected, torch.no_grad():
            found = [each(tokens(2, 6)).logits for each in (reference, protected.model)]
        assert error(found[1], found[0]) < (SHARES if profile == "shared" else EXACT), options


@pytest.mark.parametrize("options", REFUSED, ids=lambda options: next(iter(options)))
def test_options_of_lora_that_are_refused(protect: Callable[..., Any], options: dict[str, Any]) -> None:
    name, model = next(iter(options)), adapted_with(**options)
    with pytest.raises(UnsupportedModelError, match=name) as caught:
        protect(model)
    assert caught.value.where == "adapter default"


def test_names_of_parameters_that_are_none_of_the_models_are_no_option(protect: Callable[..., Any]) -> None:
    """PEFT makes them of gate_proj, up_proj and down_proj for a type that may have experts, and adapts none here."""
    config = Qwen3MoeConfig(**SQUARE, head_dim=6, mlp_only_layers=[0, 1])
    reference = adapted(randomize(AutoModelForCausalLM.from_config(config).double().eval()))
    assert "gate_up_proj" in reference.peft_config["default"].target_parameters
    ids = tokens(2, 6)
    with protect(copy.deepcopy(reference), profile="strict", key_block=4) as protected:
        for name in ("second", "third"):
            for each in (reference, protected.model):
                each.zero_grad()
                scalar(each(ids).logits).backward()
            assert len(gradients(reference)) == 2 * 4 * 2
            assert worst(gradients(protected.model), gradients(reference)) < EXACT
            for each in (reference, protected.model):  # all configurations are looked at again
                each.add_adapter(name, LoraConfig(r=2, target_modules=["q_proj"]))
        named = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["up_proj.weight"])
        with pytest.raises(UnsupportedModelError, match="target_parameters"):
            protected.model.add_adapter("fourth", named)


def test_an_option_that_nobody_knows_is_refused_by_name(protect: Callable[..., Any], monkeypatch: Any) -> None:
    monkeypatch.setattr("obfuscatune.enclave.families.options.KNOWN", KNOWN - {"use_rslora"})
    with pytest.raises(UnsupportedModelError, match="use_rslora"):
        protect(adapted_with(use_rslora=True))


# Generation

WAYS: list[dict[str, Any]] = [
    {"do_sample": True, "temperature": 1.3, "top_k": 9, "top_p": 0.9},
    {"do_sample": True, "min_p": 0.05, "typical_p": 0.9},
    {"do_sample": True, "epsilon_cutoff": 1e-3, "eta_cutoff": 1e-3, "top_h": 0.6},
    {"num_beams": 3, "num_return_sequences": 2, "early_stopping": True, "length_penalty": 0.5},
    {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "encoder_repetition_penalty": 1.2},
    {"guidance_scale": 1.5},
    {"bad_words_ids": [[3], [4, 5]], "suppress_tokens": [7], "begin_suppress_tokens": [8]},
    {"sequence_bias": [[[9], 2.0]], "renormalize_logits": True, "remove_invalid_values": True},
    {"use_cache": False, "min_new_tokens": 4, "exponential_decay_length_penalty": (2, 1.1), "forced_eos_token_id": 0},
    {"prefill_chunk_size": 2},
]


@pytest.fixture(scope="module")
def balanced() -> Iterator[tuple[Any, Any]]:
    reference, model = twins()
    with obfuscatune.protect(model, profile="balanced", worker="spawn", timeout=20.0) as protected:
        yield reference, protected.model


@pytest.mark.parametrize("how", WAYS, ids=lambda how: "-".join(how))
def test_ways_to_generate(balanced: tuple[Any, Any], how: dict[str, Any]) -> None:
    found = []
    for model in balanced:
        torch.manual_seed(7)
        found.append(model.generate(tokens(2, 6), max_new_tokens=6, **how))
    assert torch.equal(*found)


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["plain", "paper", "strict", "stream", "shared", "enclave"])
def test_ways_to_generate_under_the_other_profiles(everywhere: Callable[..., Any], profile: str) -> None:
    reference, model = twins()
    with everywhere(model, profile) as protected:
        for how in WAYS:
            test_ways_to_generate((reference, protected.model), how)


def test_what_generation_returns_besides(balanced: tuple[Any, Any]) -> None:
    asked = {"output_scores": True, "output_logits": True, "output_hidden_states": True}
    found = [
        model.generate(
            tokens(1, 6), max_new_tokens=4, prompt_lookup_num_tokens=2, **asked, return_dict_in_generate=True
        )
        for model in balanced
    ]
    assert torch.equal(found[0].sequences, found[1].sequences)
    for name in ("scores", "logits"):
        assert error(torch.stack(found[1][name]), torch.stack(found[0][name])) < EXACT
    for expected, got in zip(found[0].hidden_states, found[1].hidden_states, strict=True):
        assert error(torch.stack(got), torch.stack(expected)) < EXACT


@pytest.mark.parametrize("how", [{"cache_implementation": "static"}, {"output_attentions": True}], ids=str)
def test_ways_to_generate_that_are_refused(balanced: tuple[Any, Any], how: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        balanced[1].generate(tokens(2, 6), max_new_tokens=3, return_dict_in_generate=True, **how)
    assert caught.value.hint and caught.value.where
    test_ways_to_generate(balanced, {})  # the session goes on


# The Trainer

SETTINGS: list[dict[str, Any]] = [
    {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "weight_decay": 0.1},
    {"label_smoothing_factor": 0.1, "neftune_noise_alpha": 5.0},
    {"activation_checkpointing": True, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6},
    {"lr_scheduler_type": "cosine", "warmup_steps": 1, "optim": "sgd", "seed": 3},
    {"optim": "adafactor", "learning_rate": 1e-3},
    {"eval_strategy": "epoch"},
    {"bf16": True},
]


def trainer_of(model: Any, directory: Path, **settings: Any) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 6, seed=5)]
    arguments = TrainingArguments(
        **{
            "output_dir": str(directory),
            "per_device_train_batch_size": 2,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "optim": "adamw_torch",
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            **settings,
        }
    )
    return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:2])


def train(model: Any, directory: Path, **settings: Any) -> dict[str, torch.Tensor]:
    trainer_of(model, directory, **settings).train()
    return {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(settings))
def test_settings_of_the_trainer(
    protect: Callable[..., Any], tmp_path: Path, profile: str, settings: dict[str, Any]
) -> None:
    half = "bf16" in settings
    reference, model = twins(dtype=torch.float32 if half else torch.float64)
    before = {name: tensor.clone() for name, tensor in reference.state_dict().items() if "lora_" in name}
    expected = train(reference, tmp_path, **settings)
    with protect(model, profile=profile, key_block=4) as protected:
        got = train(protected.model, tmp_path, **settings)
    assert worst(got, expected) < (BFLOAT16 if half else TRAINED)
    assert worst(before, expected) > 1e-3


def test_settings_that_are_refused(protect: Callable[..., Any], tmp_path: Path) -> None:
    _, model = twins()
    with protect(model) as protected:
        with pytest.raises(UnsupportedModelError, match="compiled"):
            trainer_of(protected.model, tmp_path, torch_compile=True).train()
        with pytest.raises(UnsupportedModelError, match="keeps its dtype"):
            trainer_of(protected.model, tmp_path, bf16_full_eval=True).evaluate()
        assert protected.model.eval()(tokens(2, 4)).logits.dtype == torch.float64  # as it was, and the session goes on


def test_a_stock_trainer_where_the_worker_trains(protect: Callable[..., Any], tmp_path: Path) -> None:
    _, model = twins()
    with protect(model, profile="paper") as protected, pytest.raises(UsageError, match="create_optimizer"):
        train(protected.model, tmp_path)
