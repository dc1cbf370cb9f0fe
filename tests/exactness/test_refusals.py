"""What would be silently wrong is refused, before a worker is started where it can be seen by then."""

import ast
import contextlib
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Model
from transformers.integrations.peft import MIN_PEFT_VERSION

import obfuscatune
from obfuscatune import NotFiniteError, UnsupportedModelError, UsageError

from .families import model_of, twins_of, wide
from .models import TARGETS, VARIANTS, error, gpt2, gradients, scalar, tokens, twins, with_lora, worst

NO_WORKER = "unix:///nonexistent/worker.sock"  # connecting there fails with another error


@pytest.mark.parametrize(
    "options",
    [{"worker": None}, {"worker": []}, {"worker": [1, 2, 3]}, {"threads": 0}, {"threads": 4097}, {"threads": "2"}]
    + [{"timeout": timeout} for timeout in ("1", 0, -1.0, float("nan"), float("inf"), True)],
    ids=str,
)
def test_options_that_mean_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        obfuscatune.protect(gpt2(), **{"worker": NO_WORKER, **options})


def test_a_model_that_was_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = gpt2()
    with pytest.raises(UnsupportedModelError, match="inference_mode"):
        obfuscatune.protect(model, worker=NO_WORKER)


@pytest.mark.parametrize("profile", ["balanced", "stream"])
def test_protected_twice(protect: Any, profile: str) -> None:
    model = gpt2()
    with protect(model, profile=profile), pytest.raises(UnsupportedModelError, match="protected already"):
        obfuscatune.protect(model, worker=NO_WORKER)


def test_a_model_without_a_head() -> None:
    with pytest.raises(UnsupportedModelError, match="no decoder blocks"):
        obfuscatune.protect(GPT2Model(gpt2().config), worker=NO_WORKER)


def test_no_block_for_the_worker() -> None:
    with pytest.raises(UsageError, match="no block is left"):
        obfuscatune.protect(gpt2(), worker=NO_WORKER, enclave_blocks=2)


def _a_merged_model(model: Any) -> None:
    """As tools for merging make them: one block twice in the list."""
    blocks = model.model.layers
    model.model.layers = nn.ModuleList([blocks[0], blocks[1], blocks[1]])
    model.config.num_hidden_layers = 3


def _one_mlp_for_all(model: Any) -> None:
    model.model.layers[1].mlp = model.model.layers[0].mlp


def _one_weight_for_two_layers(model: Any) -> None:
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight


def _one_weight_for_layer_and_head(model: Any) -> None:
    model.lm_head.weight = model.model.layers[1].self_attn.q_proj.weight


@pytest.mark.parametrize(
    "change",
    [_a_merged_model, _one_mlp_for_all, _one_weight_for_two_layers, _one_weight_for_layer_and_head],
    ids=lambda change: change.__name__,
)
@pytest.mark.parametrize("profile", ["plain", "paper", "balanced", "strict", "stream"])
def test_what_stands_at_two_places(profile: str, change: Any) -> None:
    model = model_of("llama", lora=False)
    change(model)
    with pytest.raises(UnsupportedModelError, match=r"a weight that two layers share: got .* \(at model\.layers\."):
        obfuscatune.protect(model, profile=profile, worker=NO_WORKER)


def test_a_factor_of_two_layers_that_the_worker_trains(protect: Any) -> None:
    """Elsewhere its gradients arrive in one parameter, as in plain PEFT."""
    for profile in ("paper", "balanced", "strict", "stream"):
        reference, model = twins_of("llama")
        for each in (reference, model):
            one, other = (block.self_attn.q_proj for block in each.get_base_model().model.layers)
            one.lora_A["default"] = other.lora_A["default"]
        if profile == "paper":
            with pytest.raises(
                UnsupportedModelError, match=r"one LoRA factor of two layers.*layers\.1\.self_attn\.q_proj"
            ):
                protect(model, profile=profile)
            continue
        with wide(), protect(model, profile=profile) as protected:
            for each in (reference, protected.model):
                scalar(each(input_ids=tokens(2, 6)).logits).backward()
            assert worst(gradients(protected.model), gradients(reference)) < 1e-9


@pytest.mark.parametrize("profile", ["balanced", "stream"])
def test_blocks_that_the_configuration_leaves_out(protect: Any, profile: str) -> None:
    """Llama calls as many as it says; GPT-2 all."""
    for family in ("llama", "gpt2"):
        reference, model = twins_of(family)
        with wide(), protect(model, profile=profile) as protected, torch.no_grad():
            for each in (reference, protected.model):
                each.get_base_model().config.num_hidden_layers = 1
            refused = pytest.raises(UnsupportedModelError, match="got 0 called after the first, expected 1")
            with refused if (family, profile) == ("llama", "stream") else contextlib.nullcontext():
                got = protected.model(input_ids=tokens(2, 6), use_cache=False).logits
                assert error(got, reference(input_ids=tokens(2, 6), use_cache=False).logits) < 1e-9
            protected.model.get_base_model().config.num_hidden_layers = 2
            protected.model(input_ids=tokens(2, 6), use_cache=False)  # the session goes on


@pytest.mark.parametrize("variant", ["plain", "paper", "balanced", "balanced, both enclave", "stream"])
def test_trained_biases_that_would_leave(protect: Any, variant: str) -> None:
    profile, switches = VARIANTS[variant]
    config = LoraConfig(r=2, target_modules=list(TARGETS), fan_in_fan_out=True, bias="all")
    model = get_peft_model(gpt2(), config)
    with pytest.raises(UnsupportedModelError, match="base parameter that is trained"):
        protect(model, profile=profile, **switches)


@pytest.mark.parametrize("variant", ["plain", "paper", "paper, lora enclave", "balanced", "stream"])
def test_merging(protect: Any, variant: str) -> None:
    profile, switches = VARIANTS[variant]
    with protect(twins()[1], profile=profile, **switches) as protected:
        with pytest.raises(UnsupportedModelError, match="cannot be merged"):
            protected.model.merge_adapter()
        with pytest.raises(UnsupportedModelError, match="cannot be merged"):
            protected.model.merge_and_unload()


@pytest.mark.parametrize("variant", ["paper", "balanced", "paper, lora split", "stream"])
def test_another_adapter_for_each_row(protect: Any, variant: str) -> None:
    profile, switches = VARIANTS[variant]
    model = with_lora(gpt2())
    if profile != "paper":
        model.add_adapter("other", LoraConfig(r=2, target_modules=list(TARGETS), fan_in_fan_out=True))
    names = ["default", "other" if profile != "paper" else "__base__"]
    with protect(model, profile=profile, **switches) as protected, torch.no_grad():
        protected.model(input_ids=tokens(2, 4))
        with pytest.raises(UnsupportedModelError, match="adapter_names"):
            protected.model(input_ids=tokens(2, 4), adapter_names=names)
        protected.model(input_ids=tokens(2, 4))  # PEFT's hooks are gone, though its call did not end well


def test_a_model_outlives_what_protected_it(protect: Any) -> None:
    reference, model = twins()
    running = protect(model, profile="balanced").model
    with torch.no_grad():
        assert error(running(input_ids=tokens(2, 4)).logits, reference(input_ids=tokens(2, 4)).logits) < 1e-9


@pytest.mark.parametrize("profile", ["balanced", "stream"])
def test_a_factor_that_did_not_arrive_is_sent_again(protect: Any, profile: str) -> None:
    """An interrupt between keying a factor and sending it must not leave the worker with the one before."""
    reference, model = twins()
    with protect(model, profile=profile) as protected, torch.no_grad():
        scalar(protected.model(input_ids=tokens(2, 4)).logits)
        for each in (reference, protected.model):
            for name, parameter in each.named_parameters():
                if "lora_" in name:
                    parameter.mul_(2)
        request = protected.session.request

        def interrupted(*args: Any) -> Any:
            raise KeyboardInterrupt

        protected.session.request = interrupted
        with pytest.raises(KeyboardInterrupt):
            protected.model(input_ids=tokens(2, 4))
        protected.session.request = request
        ours = protected.model(input_ids=tokens(2, 4)).logits
        assert error(ours, reference(input_ids=tokens(2, 4)).logits) < 1e-9


@pytest.mark.parametrize("switches", [{"enclave_blocks": 1}, {}], ids=str)
def test_everything_trained_is_stepped(protect: Any, switches: dict[str, Any]) -> None:
    """LoRA of a block that stays inside, and a trained head, beside factors on the worker."""
    reference, model = twins()
    for each in (reference, model):
        each.get_base_model().transformer.ln_f.weight.requires_grad_(True)
    trained = [p for p in reference.parameters() if p.requires_grad]
    with protect(model, profile="paper", **switches) as protected:
        optimizers = [torch.optim.SGD(trained, lr=0.1), protected.create_optimizer("sgd", lr=0.1)]
        for _ in range(2):
            for each, optimizer in zip((reference, protected.model), optimizers, strict=True):
                optimizer.zero_grad()
                scalar(each(input_ids=tokens(2, 5)).logits).backward()
                optimizer.step()
        state = optimizers[1].state_dict()
        optimizers[1].load_state_dict(state)
        ours, theirs = protected.model.state_dict(), reference.state_dict()
        checked = [name for name in theirs if "lora_" in name or "ln_f.weight" in name]
        assert len(checked) > 8
        assert max(error(ours[name], theirs[name]) for name in checked) < 1e-9


def test_options_of_an_optimizer_on_the_worker(protect: Any) -> None:
    _, model = twins()
    with protect(model, profile="paper") as protected:
        with pytest.raises(UsageError, match=r"fused.*betas"):
            protected.create_optimizer("adamw", lr=0.1, fused=True)
        optimizer = protected.create_optimizer("adamw", lr=0.1, betas=(0.9, 0.95))
        scalar(protected.model(input_ids=tokens(2, 4)).logits).backward()
        optimizer.step()


def test_keys_stay_in_float32_under_autocast(protect: Any) -> None:
    from obfuscatune.enclave.keys import MasterSecret, build

    key = build("haar", MasterSecret.generate().stream("autocast"), 64)
    x = torch.randn(5, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ torch.eye(64)).dtype == torch.bfloat16  # the control: it is on
        there_and_back = key.apply_inverse(key.apply(x))
    assert there_and_back.dtype == torch.float32
    assert error(there_and_back, x) < 1e-5


@pytest.mark.parametrize("variant", ["paper", "balanced", "strict", "stream"])
def test_numbers_that_are_not_finite_accuse_no_worker(protect: Any, variant: str) -> None:
    profile, switches = VARIANTS[variant]
    reference, model = twins()
    with protect(model, profile=profile, **switches) as protected:
        expected = reference(tokens(2, 4)).logits
        embedded = reference.get_input_embeddings()(tokens(2, 4)).detach()
        with pytest.raises(NotFiniteError):
            protected.model(inputs_embeds=embedded * float("nan"))
        for large in (float("inf"), 1e305)[: 2 if profile in ("paper", "strict") else 1]:  # which take squares
            value = protected.model(tokens(2, 4)).logits
            with pytest.raises(NotFiniteError):
                (value * large).sum().backward()
            protected.model.zero_grad()
        factors = [p for name, p in protected.model.named_parameters() if "lora_" in name]
        before = [p.detach().clone() for p in factors]
        with torch.no_grad():
            for p in factors:
                p.mul_(1e200)
        for mode in (torch.no_grad(), torch.enable_grad()):
            with mode, pytest.raises(NotFiniteError):
                protected.model(tokens(2, 4))
        with torch.no_grad():
            for p, old in zip(factors, before, strict=True):
                p.copy_(old)
        value = protected.model(tokens(2, 4)).logits
        assert error(value, expected) < 1e-9  # the session goes on
        scalar(value).backward()
        del value
        protected.model(tokens(2, 4))
        assert protected.session.request("stats", "-", {}, {}, {})[0]["kept_calls"] == 0


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("profile", ["plain", "paper", "balanced", "strict", "stream"])
def test_a_batch_without_rows(protect: Any, profile: str, family: str) -> None:
    """Plain PyTorch cannot run GPT-2 or a backward on one either; what is asked is that the session goes on."""
    reference, model = twins_of(family)
    with wide(), protect(model, profile=profile) as protected:
        for shape in ((0, 6), (2, 0)):
            with contextlib.suppress(RuntimeError, IndexError, UsageError):
                assert protected.model(torch.ones(shape, dtype=torch.int64)).logits.shape[:2] == shape
        ours = protected.model(input_ids=tokens(2, 4)).logits
        assert error(ours, reference(input_ids=tokens(2, 4)).logits) < 1e-9


def test_attention_in_both_directions(protect: Any) -> None:
    model = gpt2()
    model.config.is_causal = False
    with pytest.raises(UnsupportedModelError, match="both directions"):
        obfuscatune.protect(model, worker="spawn", threads=1)
    model = gpt2()
    model.transformer.h[1].attn.is_causal = False
    with pytest.raises(UnsupportedModelError, match=r"is_causal=False.*h\.1\.attn"):
        obfuscatune.protect(model, worker="spawn", threads=1)


@pytest.mark.parametrize("profile", ["balanced", "strict"])
def test_training_of_a_model_without_an_adapter(protect: Any, profile: str) -> None:
    """Not the plain model's, whose large weights are trained too; unless these were frozen before."""
    _, model = twins(lora=False)
    with protect(model, profile=profile) as protected:
        before = protected.model(tokens(2, 4)).logits
        scalar(before).backward()
        with pytest.raises(UnsupportedModelError, match=r"all of a model is to be trained.*\(at "):
            torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01).step()
        assert error(protected.model(tokens(2, 4)).logits, before) < 1e-9
    reference, model = twins(lora=False)
    for each in (reference, model):
        each.requires_grad_(requires_grad=False)
        each.get_input_embeddings().weight.requires_grad_()
    with protect(model, profile=profile) as protected:
        for each in (reference, protected.model):
            scalar(each(tokens(2, 4)).logits).backward()
            torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.01).step()
        assert error(model(tokens(2, 4)).logits, reference(tokens(2, 4)).logits) < 1e-9


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION), reason="add_adapter of this transformers wants a newer PEFT"
)
def test_biases_that_transformers_says_it_trains(protect: Any) -> None:
    model = gpt2()
    model.add_adapter(LoraConfig(r=2, target_modules=list(TARGETS), fan_in_fan_out=True, bias="all"))
    with pytest.raises(UnsupportedModelError, match="base parameter that is trained"):
        protect(model, profile="balanced")


def test_every_refusal_has_a_hint() -> None:
    """In the code, because many a refusal is of a model that nobody has made."""
    without, count = [], 0
    for path in sorted(Path(obfuscatune.__file__).with_name("enclave").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("UnsupportedModelError", "NotHereError"):
                count += 1
                if not {"hint", None} & {keyword.arg for keyword in node.keywords}:
                    without.append(f"{path.name}:{node.lineno}")
    assert count > 50 and not without
