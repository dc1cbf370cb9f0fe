"""Training LoRA on Llama-like models is training plain PEFT, whatever PEFT is asked to adapt; the adapter fits both."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from obfuscatune.enclave.families import FAMILIES

from .families import RECORDED, model_of, twins_of, wide
from .models import error, gradients, randomize_lora, scalar, tokens, worst
from .test_families import NO_STREAM
from .test_training import adapter, by_hand, by_trainer, curve

EXACT = 1e-9  # measured 4.4e-14
AFTER_TRAINING = 1e-8  # relative to the largest entry, after 30 steps of AdamW; measured 4.5e-11
MONARCH = {"key_block": 4}


SLOW = pytest.mark.slow
TRAINED = [
    pytest.param("llama", "balanced", id="llama, balanced"),
    pytest.param("llama", "strict", id="llama, strict"),
    pytest.param("llama", "stream", id="llama, stream", marks=SLOW),
    pytest.param("gemma2", "balanced", id="gemma2, balanced", marks=SLOW),
    pytest.param("gemma2", "strict", id="gemma2, strict", marks=SLOW),
    pytest.param("gpt_neox", "balanced", id="gpt_neox, balanced", marks=SLOW),
    pytest.param("gpt_neox", "stream", id="gpt_neox, stream", marks=SLOW),
]


@pytest.mark.parametrize(("family", "profile"), TRAINED)
def test_thirty_steps_of_adamw(protect: Any, tmp_path: Path, family: str, profile: str) -> None:
    train = by_trainer if family == "llama" else by_hand
    with wide():
        reference, model = twins_of(family)
        untrained = adapter(reference)
        expected = train(reference, tmp_path)
        with protect(model, profile=profile, **MONARCH) as protected:
            got = train(protected.model, tmp_path)
            assert error(curve(got), curve(expected)) < AFTER_TRAINING
            assert worst(adapter(protected.model), adapter(reference)) < AFTER_TRAINING
    assert worst(untrained, adapter(reference)) > 0.1  # the control: it has been trained


PATTERNS: dict[str, dict[str, Any]] = {
    "usual names": {"target_modules": ["q_proj", "v_proj"]},
    "regex": {"target_modules": r".*\.(o_proj|gate_proj|down_proj)"},
    "ranks and alphas of their own": {
        "rank_pattern": {"q_proj": 2, "up_proj": 5},
        "alpha_pattern": {"v_proj": 11, "down_proj": 1},
    },
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers", "target_modules": ["k_proj", "up_proj"]},
    "rank-stabilized": {"use_rslora": True, "target_modules": ["gate_proj", "o_proj"]},
    "on the head too": {"target_modules": ["q_proj", "down_proj", "lm_head"]},
}


@pytest.mark.parametrize("profile", ["balanced", "strict", "stream", "paper"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_whatever_is_adapted(protect: Any, pattern: str, profile: str) -> None:
    with wide():
        reference, model = twins_of("llama", **PATTERNS[pattern])
        with protect(model, profile=profile) as protected:
            for each in (reference, protected.model):
                scalar(each(input_ids=tokens(2, 6)).logits).backward()
                each.eval()
            with torch.no_grad():
                got, expected = (each(input_ids=tokens(2, 6)).logits for each in (protected.model, reference))
            assert error(got, expected) < EXACT
            wanted = gradients(reference)
            held = {id(p) for slot in protected._held.slots for p in (slot._a, slot._b)}
            kept = {name for name, p in protected.model.named_parameters() if id(p) not in held}
            wanted = {name: grad for name, grad in wanted.items() if name in kept}
            assert worst(gradients(protected.model), wanted) < EXACT


@pytest.mark.parametrize("profile", ["balanced", "strict", "stream", "paper"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "phi3"])
def test_the_exported_adapter_loads_in_plain_peft(protect: Any, tmp_path: Path, family: str, profile: str) -> None:
    with wide():
        base = model_of(family, lora=False)
        model = model_of(family)
        with protect(model, profile=profile) as protected, torch.no_grad():
            randomize_lora(protected.model, seed=5)  # as training would: new values after the first were sent
            expected = protected.model(input_ids=tokens(2, 6)).logits
            protected.model.save_pretrained(tmp_path)
        with torch.no_grad():
            loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
            assert error(loaded(input_ids=tokens(2, 6)).logits, expected) < EXACT
            assert error(base(input_ids=tokens(2, 6)).logits, expected) > 1e-3


def test_lora_that_the_worker_trains_on_layers_side_by_side(protect: Any) -> None:
    """SGD does not depend on coordinates: held factors of q, k, v and of gate, up end where plain PEFT's do."""
    with wide():
        reference, model = twins_of("llama")
        plain = torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], lr=0.01)
        with protect(model, profile="paper") as protected:
            ours = protected.create_optimizer("sgd", lr=0.01)
            for step in range(3):
                for each, optimizer in ((reference, plain), (protected.model, ours)):
                    optimizer.zero_grad()
                    scalar(each(input_ids=tokens(2, 6, seed=step)).logits).backward()
                    optimizer.step()
            assert worst(adapter(protected.model), adapter(reference)) < AFTER_TRAINING


@pytest.mark.filterwarnings("ignore:.*normalized in each head")
@pytest.mark.parametrize("profile", ["balanced", "strict", "stream", "paper"])
def test_the_adapter_keeps_its_names_and_their_order(protect: Any, profile: str) -> None:
    """An optimizer's state goes by the order, and Phi-3 has the output layer of its attention first."""
    for family in (name for name in RECORDED if "," not in name):
        if profile == "stream" and family in NO_STREAM:
            continue
        reference, model = twins_of(family)
        with protect(model, profile=profile) as protected:
            assert _names(protected.model) == _names(reference), family


def _names(model: Any) -> tuple[list[str], list[str]]:
    """Of the adapter's parameters, and of its tensors in a file."""
    return tuple(
        [name for name in names if "lora_" in name] for names in (dict(model.named_parameters()), model.state_dict())
    )


@pytest.mark.filterwarnings("ignore:.*normalized in each head")
@pytest.mark.parametrize("switches", [{}, {"attention": "enclave", "mlp": "enclave"}], ids=["whole", "linear layers"])
def test_dropout_of_lora_draws_in_the_plain_models_order(protect: Any, switches: dict[str, Any]) -> None:
    """On the layers whose input the enclave has: q, k and v, and gate and up, in the order in which they are called."""
    for family in (name for name in RECORDED if "," not in name):
        spec = FAMILIES[RECORDED[family]().model_type]
        with wide():
            reference, model = twins_of(family, target_modules=[*spec.first, *spec.up], lora_dropout=0.4)
            with protect(model, profile="balanced", lora_placement="split", **switches) as protected:
                for each in (reference, protected.model):
                    torch.manual_seed(3)
                    scalar(each.train()(input_ids=tokens(2, 6)).logits).backward()
                assert worst(gradients(protected.model), gradients(reference)) < EXACT, family
