"""What PEFT does to all layers in turn, and not to those that left, is refused with the model as it was."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from obfuscatune import UnsupportedModelError

from .models import (
    TARGETS,
    error,
    expected_gradients,
    gpt2,
    gradients,
    randomize_lora,
    scalar,
    tokens,
    with_lora,
    worst,
)
from .uses import logits

EXACT = 1e-9
INSIDE = {"enclave_blocks": 1}
PROFILES = ["paper", "balanced", "strict", "stream"]

# Of what stays, what PEFT comes to before the first layer that left: options of LoRA, and switches.
STAYING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a block": ({}, INSIDE),
    "the embeddings": ({"targets": (*TARGETS, "wte")}, {}),
    "a copy of the embeddings": ({"modules_to_save": ["wte"]}, {}),
    "trained tokens": ({"trainable_token_indices": [1, 2]}, {}),
}

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's, of tied weights


def adapted(**options: Any) -> Any:
    model = with_lora(gpt2(), **options)
    generator = torch.Generator().manual_seed(6)
    for name, parameter in model.named_parameters():
        if name.endswith(".default") or "modules_to_save" in name:  # factors of embeddings, tokens, copies
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def state_of(model: Any) -> tuple[list[Any], dict[str, Tensor], dict[str, bool]]:
    """Modules, their adapters and what is merged; values; what is trained."""
    modules: list[Any] = []
    for name, module in model.named_modules():
        more = (module.active_adapters, module.merged_adapters) if isinstance(module, BaseTunerLayer) else ()
        modules.append((name, type(module), copy.deepcopy(more)))
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    return modules, values, {name: p.requires_grad for name, p in model.named_parameters()}


def require_same(model: Any, before: Any) -> None:
    modules, values, trained = state_of(model)
    assert modules == before[0]
    assert trained == before[2]
    assert worst(values, before[1]) == 0


def by_merge_adapter(model: Any) -> None:
    model.merge_adapter()


def by_merge_and_unload(model: Any) -> None:
    model.merge_and_unload(safe_merge=True)


def by_each_layer(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()


@pytest.mark.parametrize("way", [by_merge_adapter, by_merge_and_unload, by_each_layer], ids=lambda way: way.__name__)
@pytest.mark.parametrize("staying", STAYING)
@pytest.mark.parametrize("profile", PROFILES)
def test_merging_is_refused_before_anything_is_merged(
    protect: Callable[..., Any], profile: str, staying: str, way: Callable[[Any], None]
) -> None:
    options, switches = STAYING[staying]
    reference = adapted(**options)
    with protect(copy.deepcopy(reference), profile=profile, **switches) as protected:
        before = state_of(protected.model)
        with pytest.raises(UnsupportedModelError, match=r"cannot be merged.*at transformer\.h\.") as caught:
            way(protected.model)
        assert caught.value.hint
        require_same(protected.model, before)
        protected.model.unmerge_adapter()  # nothing to do, as ever
        for each in (reference, protected.model):  # training goes on
            scalar(each(tokens(2, 6)).logits).backward()
        expected = expected_gradients(reference, profile, switches)
        assert expected or profile == "paper"
        assert worst(gradients(protected.model), expected) < EXACT
    with pytest.raises(UnsupportedModelError, match="cannot be merged"):  # and no more once it has ended
        way(protected.model)


@pytest.mark.parametrize("profile", PROFILES)
def test_an_outer_model_that_protect_has_not_seen_merges_nothing(protect: Callable[..., Any], profile: str) -> None:
    model = adapted(targets=(*TARGETS, "wte"))
    with protect(model.get_base_model(), profile=profile):
        before = state_of(model)
        with pytest.raises(UnsupportedModelError, match="cannot be merged"):
            model.merge_adapter()
        require_same(model, before)


def test_a_layer_that_came_later_merges_nothing(protect: Callable[..., Any]) -> None:
    """In the embeddings, which are met first."""
    with protect(adapted(), profile="balanced") as protected:
        model = protected.model
        model.add_adapter("second", LoraConfig(r=2, target_modules=["wte", "c_attn"], fan_in_fan_out=True))
        model.set_adapter("second")
        for look in (lambda: None, lambda: logits(model)):
            look()
            before = state_of(model)
            for way in (by_merge_adapter, by_merge_and_unload):
                with pytest.raises(UnsupportedModelError, match="cannot be merged"):
                    way(model)
            require_same(model, before)
        with pytest.raises(UnsupportedModelError, match="cannot be merged"):
            by_each_layer(model)
        require_same(model, before)


@pytest.mark.parametrize("staying", STAYING)
@pytest.mark.parametrize("profile", PROFILES)
def test_unloading_needs_no_weight(protect: Callable[..., Any], profile: str, staying: str) -> None:
    options, switches = STAYING[staying]
    reference = adapted(**options)
    with protect(copy.deepcopy(reference), profile=profile, **switches) as protected:
        got, expected = protected.model.unload(), reference.unload()
        assert not any(isinstance(module, LoraLayer) for module in got.modules())
        assert error(logits(got), logits(expected)) < EXACT
        protected.model.merge_adapter()  # of nothing, as in plain PEFT


@pytest.mark.parametrize("profile", ["plain", *PROFILES])
def test_an_adapter_of_what_stays_alone_is_merged(protect: Callable[..., Any], profile: str) -> None:
    reference = adapted(targets=("wte",))
    with protect(copy.deepcopy(reference), profile=profile) as protected:
        before = logits(protected.model)
        for each in (reference, protected.model):
            each.merge_adapter()
        assert error(logits(protected.model), logits(reference)) < EXACT
        protected.model.unmerge_adapter()
        assert error(logits(protected.model), before) < EXACT


# New adapters, on a model whose LoRA is on c_attn alone

NEW: dict[str, dict[str, Any]] = {
    "a start from the weight": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "DoRA": {"use_dora": True},
    "layers without a slot": {"target_modules": ["wte", "c_attn", "c_fc"]},
    "all layers": {"target_modules": "all-linear"},
    "a pattern": {"target_modules": r".*\.(wte|mlp\.c_fc)"},
    "a copy of a part": {"modules_to_save": ["wte", "mlp"]},
}
FITS = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}


def by_add_adapter(model: Any, config: LoraConfig, directory: Path) -> None:
    model.add_adapter("second", config)


def by_load_adapter(model: Any, config: LoraConfig, directory: Path) -> None:
    plain = with_lora(gpt2(), targets=("c_attn",))
    plain.add_adapter("second", config)
    plain.save_pretrained(directory, selected_adapters=["second"])
    model.load_adapter(directory / "second", "second")


@pytest.mark.parametrize("way", [by_add_adapter, by_load_adapter], ids=lambda way: way.__name__)
@pytest.mark.parametrize("new", NEW)
@pytest.mark.parametrize("profile", ["balanced", "strict", "stream"])
def test_a_new_adapter_is_refused_before_any_layer_has_it(
    protect: Callable[..., Any], tmp_path: Path, profile: str, new: str, way: Callable[..., None]
) -> None:
    if way is by_load_adapter and "init_lora_weights" in NEW[new]:
        pytest.skip("the start is no part of an adapter that was saved")
    reference = with_lora(gpt2(), targets=("c_attn",))
    with protect(copy.deepcopy(reference), profile=profile, **INSIDE) as protected:
        model = protected.model
        next(p for name, p in model.named_parameters() if "lora_A" in name).requires_grad_(False)
        before = state_of(model)
        with pytest.raises(UnsupportedModelError) as caught:
            way(model, LoraConfig(**{**FITS, **NEW[new]}), tmp_path)
        assert caught.value.where and caught.value.hint
        require_same(model, before)
        assert list(model.peft_config) == ["default"]
        assert error(logits(model), logits(reference)) < EXACT
        for each in (reference, model):  # the name is free, and nothing of the first attempt is in what gets it
            each.add_adapter("second", LoraConfig(**FITS))
            randomize_lora(each, seed=9, adapter="second")
            each.set_adapter("second")
        assert error(logits(model), logits(reference)) < EXACT
