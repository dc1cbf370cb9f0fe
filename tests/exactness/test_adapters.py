"""What training code does with a model and its adapters, and what is refused because it cannot be exact."""

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.tuners.lora import LoraLayer
from transformers import GPT2Config, GPT2LMHeadModel, OlmoConfig, OlmoForCausalLM

from obfuscatune import UnsupportedModelError
from obfuscatune.protocol.activations import ACTIVATION_NAMES
from obfuscatune.worker.segments import ACTIVATIONS as SEGMENT_ACTIVATIONS

from .models import VARIANTS, error, gpt2, gradients, randomize_lora, scalar, tokens, twins, with_lora, worst

EXACT = 1e-9  # float64, relative; measured 3e-14
INSIDE = [
    "plain",
    "paper, lora enclave",
    "paper, lora split",
    "balanced",
    "balanced, both enclave",
    "balanced, both enclave, lora split",
    "stream",
]


def loss(model: Any, seed: int = 0) -> torch.Tensor:
    return scalar(model(input_ids=tokens(2, 5, seed=seed)).logits)


def accumulate(model: Any) -> None:
    for seed in range(3):
        loss(model, seed).backward()


def several_forwards(model: Any) -> None:
    (loss(model, 0) * loss(model, 1) + loss(model, 2)).backward()


def backward_in_another_order(model: Any) -> None:
    first, second = loss(model, 0), loss(model, 1)
    with torch.no_grad():
        loss(model, 2)
    loss(model, 3)  # a graph that never runs backward
    first.backward()
    second.backward()


def checkpointing(model: Any) -> None:
    model.train()
    model.enable_input_require_grads()
    for reentrant in (False, True):
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        (loss(model, 0) + loss(model, 1)).backward()
    model.activation_checkpointing_disable()


def adapter_off_and_on(model: Any) -> None:
    with model.disable_adapter():
        value = loss(model, 0).detach()
    (loss(model, 0) * value).backward()


@pytest.mark.parametrize(
    "use",
    [accumulate, several_forwards, backward_in_another_order, checkpointing, adapter_off_and_on],
    ids=lambda use: use.__name__,
)
@pytest.mark.parametrize("variant", INSIDE)
def test_gradients_however_they_are_made(protect: Any, variant: str, use: Callable[[Any], None]) -> None:
    profile, switches = VARIANTS[variant]
    reference, model = twins()
    with protect(model, profile=profile, **switches) as protected:
        use(reference)
        use(protected.model)
        assert worst(gradients(protected.model), gradients(reference)) < EXACT


@pytest.mark.parametrize("variant", [*INSIDE, "paper"])
def test_new_lora_values_are_used(protect: Any, variant: str, tmp_path: Any) -> None:
    """However they come: the worker must never go on with factors that it was sent before."""
    profile, switches = VARIANTS[variant]
    reference, model = twins()
    other = with_lora(gpt2(), seed=44)
    other.save_pretrained(tmp_path)
    values = {name: tensor.clone() for name, tensor in other.state_dict().items() if "lora_" in name}
    with protect(model, profile=profile, **switches) as protected, torch.no_grad():

        def check() -> None:
            assert error(loss(protected.model), loss(reference)) < EXACT
            assert error(loss(protected.model), before) > 1e-3

        before = loss(protected.model)
        for each in (reference, protected.model):
            each.load_state_dict(values, strict=False)
        check()
        for each in (reference, protected.model):
            randomize_lora(each, seed=45)  # through parameter.data
        check()
        for each in (reference, protected.model):
            each.load_adapter(tmp_path, "default")
        check()


@pytest.mark.parametrize("variant", INSIDE)
def test_two_adapters(protect: Any, variant: str) -> None:
    profile, switches = VARIANTS[variant]
    reference, model = twins()
    for each in (reference, model):
        each.add_adapter(
            "second", LoraConfig(r=5, lora_alpha=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
        )
        each.to(torch.float64)
        randomize_lora(each, seed=8, adapter="second")
    with protect(model, profile=profile, **switches) as protected, torch.no_grad():
        results = []
        for name in ("default", "second", "default"):
            for each in (reference, protected.model):
                each.set_adapter(name)
            assert error(loss(protected.model), loss(reference)) < EXACT
            results.append(loss(protected.model))
        assert error(results[1], results[0]) > 1e-3
        assert error(results[2], results[0]) < EXACT


def test_another_adapter_than_the_worker_has_is_refused(protect: Any) -> None:
    _, model = twins()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    model.to(torch.float64)
    with protect(model, profile="paper") as protected:
        loss(protected.model)
        protected.model.set_adapter("second")
        with pytest.raises(ValueError, match="not the one on the worker"):
            loss(protected.model)


@pytest.mark.parametrize("targets", [("c_attn",), ("c_proj",), ("c_fc",), ("c_attn", "c_fc")])
@pytest.mark.parametrize("variant", ["paper, lora split", "balanced", "balanced, both enclave, lora split", "stream"])
def test_lora_on_some_layers_only(protect: Any, variant: str, targets: tuple[str, ...]) -> None:
    profile, switches = VARIANTS[variant]
    reference = with_lora(gpt2(), targets=targets, use_rslora=True)
    model = copy.deepcopy(reference)
    with protect(model, profile=profile, **switches) as protected:
        for each in (reference, protected.model):
            loss(each).backward()
        assert worst(gradients(protected.model), gradients(reference)) < EXACT


@pytest.mark.parametrize("profile", ["enclave", "balanced"])
def test_the_report_counts_the_model_and_nothing_of_pefts(protect: Any, profile: str) -> None:
    """Not the trained copy of a module beside the module, nor the trained rows of the embedding, nor a prompt."""
    counts = sum(parameter.numel() for parameter in gpt2().parameters())
    ways = [
        LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
        LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["ln_f", "wpe"]),
        LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, trainable_token_indices=[3, 4]),
    ]
    alone = [
        IA3Config(task_type="CAUSAL_LM", fan_in_fan_out=True),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ]
    held = set()
    for config in [*ways, *(alone if profile == "enclave" else [])]:
        with protect(get_peft_model(gpt2(), config), profile=profile) as protected:
            report = protected.report()
        assert report.total_parameters == counts, config
        held.add(report.enclave_parameters)
    assert len(held) == 1


def test_backward_twice_is_refused(protect: Any) -> None:
    _, model = twins()
    with protect(model) as protected:
        value = loss(protected.model)
        value.backward(retain_graph=True)
        with pytest.raises(UnsupportedModelError, match="a second time"):
            value.backward()
        loss(protected.model).backward()  # and the session goes on


# Dropout


def trained_once(model: Any) -> None:
    model.train()
    torch.manual_seed(3)
    loss(model).backward()


def test_attention_dropout_is_switched_off_with_one_warning(protect: Any) -> None:
    reference, model = twins(attn_pdrop=0.1)
    for block in reference.base_model.model.transformer.h:
        block.attn.attn_dropout.p = 0.0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        protected = protect(model)
    with protected:
        assert [(w.category, w.filename) for w in caught] == [(UserWarning, __file__)]
        assert "attn_pdrop" in str(caught[0].message) and "attention='enclave'" in str(caught[0].message)
        for each in (reference, protected.model):
            trained_once(each)
        assert worst(gradients(protected.model), gradients(reference)) < EXACT


def test_a_stock_configuration_trains(protect: Any) -> None:
    config = GPT2Config(vocab_size=37, n_embd=16, n_head=2, n_layer=1, n_positions=16, eos_token_id=0, bos_token_id=0)
    model = with_lora(GPT2LMHeadModel(config))
    with pytest.warns(UserWarning, match="attn_pdrop"):
        protected = protect(model)
    with protected:
        trained_once(protected.model)
        assert all(grad.isfinite().all() and grad.any() for grad in gradients(protected.model).values())


@pytest.mark.parametrize("variant", ["paper, lora enclave", "balanced, both enclave", "enclave"])
def test_all_dropout_is_kept_where_it_runs_in_the_enclave(protect: Any, variant: str) -> None:
    """The same random numbers in the same order: training under dropout is exact too."""
    profile, switches = VARIANTS[variant]
    dropout = {"attn_pdrop": 0.2, "resid_pdrop": 0.2, "embd_pdrop": 0.2}
    reference = with_lora(gpt2(**dropout), lora_dropout=0.2)
    model = copy.deepcopy(reference)
    with protect(model, profile=profile, **switches) as protected:
        for each in (reference, protected.model):
            trained_once(each)
        assert worst(gradients(protected.model), gradients(reference)) < EXACT


# Models that are refused, and left as they were


def cross_attention() -> Any:
    return gpt2(add_cross_attention=True)


def dora() -> Any:
    return with_lora(gpt2(), use_dora=True)


def lora_bias() -> Any:
    return with_lora(gpt2(), lora_bias=True)


def merged() -> Any:
    model = with_lora(gpt2())
    model.merge_adapter()
    return model


def another_family() -> Any:
    return OlmoForCausalLM(
        OlmoConfig(vocab_size=37, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )


def on_meta() -> Any:
    with torch.device("meta"):
        return GPT2LMHeadModel(GPT2Config(vocab_size=37, n_embd=8, n_head=1, n_layer=1))


def no_model() -> Any:
    return torch.nn.Linear(2, 2)


def mixed() -> Any:
    return get_peft_model(gpt2(), LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True), mixed=True)


def unknown_activation() -> Any:
    return gpt2(activation_function="mish")


def adalora() -> Any:
    return get_peft_model(gpt2(), AdaLoraConfig(total_step=5, target_modules=["c_attn"], fan_in_fan_out=True))


def adaption_prompt() -> Any:
    return get_peft_model(gpt2(), AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM"))


def another_part() -> Any:
    model = gpt2()
    model.transformer.h[1].mlp = torch.nn.Identity()
    return model


def no_part() -> Any:
    model = gpt2()
    model.transformer.h[1].attn = None
    return model


def another_block() -> Any:
    model = gpt2()
    model.transformer.h[1] = torch.nn.Identity()
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (cross_attention, "cross"),
        (adalora, r"(?s)kind of adapter: got AdaLoraConfig, expected LoraConfig.*at adapter default.*hint: profile="),
        (adaption_prompt, r"replaced.*got AdaptedAttentionGPT without c_attn.*at transformer\.h\.1\.attn"),
        (another_part, r"replaced.*got Identity without c_fc.*at transformer\.h\.1\.mlp"),
        (no_part, r"replaced.*got GPT2Block without attn.*at transformer\.h\.1\)"),
        (another_block, r"replaced.*got Identity without attn.*at transformer\.h\.1\)"),
        (dora, "DoRA"),
        (lora_bias, "lora_bias"),
        (merged, "unmerge_adapter"),
        (another_family, "needs a record of the model family.*model_type 'olmo'"),
        (on_meta, "meta"),
        (no_model, "not a transformers model"),
        (mixed, r"(?s)adapters of mixed kinds: got PeftMixedModel.*without mixed=True"),
        (unknown_activation, "mish"),
    ],
)
def test_refused_models(protect: Any, make: Callable[[], Any], message: str) -> None:
    model = make()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(UnsupportedModelError, match=message):
        protect(model)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_the_worker_has_every_activation_that_the_protocol_names() -> None:
    assert set(SEGMENT_ACTIVATIONS) == set(ACTIVATION_NAMES)


def test_mish_runs_where_the_activation_is_in_the_enclave(protect: Any) -> None:
    reference, model = twins(activation_function="mish")
    with protect(model, mlp="enclave") as protected, torch.no_grad():
        assert error(loss(protected.model), loss(reference)) < EXACT


def test_a_model_protected_twice_is_refused(protect: Any) -> None:
    _, model = twins()
    with protect(model, profile="paper"):
        pass
    with pytest.raises(UnsupportedModelError, match="protected already"):
        protect(model, profile="paper")


def test_other_kinds_of_adapters_are_refused(protect: Any) -> None:
    from peft import IA3Config

    model = get_peft_model(
        gpt2(), IA3Config(target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"], fan_in_fan_out=True)
    )
    with pytest.raises(UnsupportedModelError, match="layer of a kind that cannot be keyed"):
        protect(model)


def test_prefix_tuning_is_told_where_it_runs(protect: Any) -> None:
    config = PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    reference = get_peft_model(gpt2(), config).to(torch.float64).eval()
    model, another = copy.deepcopy(reference), copy.deepcopy(reference)
    with protect(model) as protected, pytest.raises(UnsupportedModelError, match=r'prefix tuning.*attention="enclave"'):
        loss(protected.model)
    with protect(another, attention="enclave") as protected:
        for each in (reference, protected.model):
            loss(each).backward()
        assert worst(gradients(protected.model), gradients(reference)) < EXACT


# Adapters that come after, on layers that had none


def by_add_adapter(model: Any, directory: Path) -> None:
    model.add_adapter("second", LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True))


def by_load_adapter(model: Any, directory: Path) -> None:
    with_lora(gpt2(), seed=44).save_pretrained(directory)
    model.load_adapter(directory, "second")


def by_get_peft_model(model: Any, directory: Path) -> None:
    get_peft_model(model.get_base_model(), LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True))


def by_pissa(model: Any, directory: Path) -> None:
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights="pissa")
    model.add_adapter("second", config)


WAYS = [by_add_adapter, by_load_adapter, by_get_peft_model, by_pissa]


@pytest.mark.filterwarnings("ignore")  # of PEFT, which the plain model would get too
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("profile", ["plain", "paper", "balanced", "strict", "stream"])
def test_an_adapter_that_needs_a_weight_which_left(protect: Any, tmp_path: Path, profile: str, way: Any) -> None:
    reference = with_lora(gpt2(dtype=torch.float32), targets=("c_attn",))
    model = copy.deepcopy(reference)
    with protect(model, profile=profile) as protected:
        with pytest.raises(
            UnsupportedModelError, match=r"(?s)is on the worker.*at transformer\.h\.0\..*hint: adapters on"
        ):
            way(protected.model, tmp_path)
        protected.model.set_adapter("default")
        assert error(loss(protected.model), loss(reference)) < 1e-4  # the session goes on


@pytest.mark.parametrize("profile", ["balanced", "paper", "strict", "stream"])
def test_no_plain_weight_stays_in_memory(protect: Any, profile: str) -> None:
    model = with_lora(gpt2())
    layers = [module.base_layer for module in model.modules() if isinstance(module, LoraLayer)]
    weights = [weakref.ref(layer.weight) for layer in layers]
    del layers
    with protect(model, profile=profile):
        gc.collect()
        assert len(weights) == 8
        assert [weight() for weight in weights] == [None] * len(weights)
