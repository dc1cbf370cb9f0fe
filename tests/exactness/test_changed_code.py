"""A model whose code was changed is run as it is where the change stays in the enclave, and refused where it leaves."""

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from obfuscatune import UnsupportedModelError

from .families import model_of, twins_of, wide
from .models import error, scalar, tokens

EXACT = 1e-9  # measured 2.5e-14
FLOAT32 = 1e-5  # of which stock norms are, measured 2e-7
CHANGED = 1e-3  # what each change does to the logits of the plain model; measured 0.17 and more
WHOLE = ("balanced", "stream")
LINEAR = ("paper", "strict")


class DoubledAttention(LlamaAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y, weights = super().forward(*args, **kwargs)
        return 2 * y, weights


class DoubledMlp(LlamaMLP):
    def forward(self, x: Any) -> Any:
        return 2 * super().forward(x)


class DoubledBlock(LlamaDecoderLayer):
    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        return super().forward(hidden_states, *args, **kwargs) + hidden_states


def attention_class(block: Any) -> None:
    block.self_attn.__class__ = DoubledAttention


def mlp_class(block: Any) -> None:
    block.mlp.__class__ = DoubledMlp


def block_class(block: Any) -> None:
    block.__class__ = DoubledBlock


def forward_of_an_instance(block: Any) -> None:
    block.mlp.forward = lambda x: torch.tanh(x)


def hook_on_attention(block: Any) -> None:
    block.self_attn.register_forward_hook(lambda module, args, output: (2 * output[0], output[1]))


def hook_on_activation(block: Any) -> None:
    block.mlp.act_fn.register_forward_hook(lambda module, args, output: 2 * output)


def hook_on_norm(block: Any) -> None:
    block.input_layernorm.register_forward_hook(lambda module, args, output: output.flip(-1))


def hook_on_block(block: Any) -> None:
    block.register_forward_pre_hook(lambda module, args: (args[0].flip(-1), *args[1:]))


def scale_of_attention(block: Any) -> None:
    block.self_attn.scaling = 0.1


def activation_of_an_mlp(block: Any) -> None:
    block.mlp.act_fn = torch.nn.ReLU()


def hook_on_linear(block: Any) -> None:
    block.mlp.down_proj.register_forward_hook(lambda module, args, output: 2 * output)


# What is changed -> profiles under which that leaves.
CHANGES: dict[Callable[[Any], None], tuple[str, ...]] = {
    attention_class: WHOLE,
    mlp_class: WHOLE,
    block_class: ("stream",),
    forward_of_an_instance: WHOLE,
    hook_on_attention: WHOLE,
    hook_on_activation: WHOLE,
    hook_on_norm: WHOLE,
    hook_on_block: ("stream",),
    hook_on_linear: (*WHOLE, *LINEAR),
    scale_of_attention: WHOLE,
    activation_of_an_mlp: WHOLE,
}


@pytest.mark.parametrize("profile", [*WHOLE, *LINEAR])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_runs_where_it_stays_and_is_refused_where_it_leaves(
    protect: Any, change: Callable[[Any], None], profile: str
) -> None:
    ids = tokens(2, 6)
    with wide(), torch.no_grad():
        stock, reference = twins_of("llama", lora=False)
        change(reference.model.layers[0])
        model = copy.deepcopy(stock)
        change(model.model.layers[0])
        expected = reference(input_ids=ids).logits
        assert error(stock(input_ids=ids).logits, expected) > CHANGED
        if profile in CHANGES[change]:
            with pytest.raises(
                UnsupportedModelError, match=r"leaves for the worker (has|is not) .* \(at model\.layers\.0"
            ):
                protect(model, profile=profile)
            with protect(model, profile=profile, enclave_blocks=1) as protected:  # that block stays
                assert error(protected.model(input_ids=ids).logits, expected) < EXACT
            return
        with protect(model, profile=profile) as protected:
            assert error(protected.model(input_ids=ids).logits, expected) < EXACT


def steer(module: Any, args: Any, output: Any) -> None:
    output[:, -1].add_(1.0)


@pytest.mark.parametrize("path", ["mlp", "mlp.down_proj", "self_attn.q_proj"])
@pytest.mark.parametrize("profile", ["strict", "paper", "balanced"])
def test_a_hook_may_change_an_output_in_place_while_gradients_are_computed(
    protect: Any, profile: str, path: str
) -> None:
    """As hooks that steer activations do."""
    if profile == "balanced" and path != "mlp":
        pytest.skip("the layer is on the worker; its hook is refused")
    ids = tokens(2, 6)
    with wide():
        reference, model = twins_of("llama", lora=False)
        unchanged = reference(input_ids=ids).logits
        with protect(model, profile=profile) as protected:
            gradients = []
            for each in (reference, protected.model):
                layer = each.model.layers[0].get_submodule(path)
                layer.register_forward_hook(steer)
                logits = each(input_ids=ids).logits
                embeddings = each.get_input_embeddings().weight
                gradients.append((logits, *torch.autograd.grad(scalar(logits), [embeddings])))
        assert error(unchanged, gradients[0][0]) > CHANGED
        assert all(error(ours, theirs) < EXACT for theirs, ours in zip(*gradients, strict=True))


NUMBERS = {
    "gpt2": {
        "activation_function": "relu",
        "n_head": 2,
        "scale_attn_weights": False,
        "scale_attn_by_inverse_layer_idx": True,
    },
    "llama": {"hidden_act": "relu", "num_attention_heads": 2},
    "gemma2": {"attn_logit_softcapping": 1.3, "query_pre_attn_scalar": 3, "hidden_activation": "relu"},
    "gpt_neox": {"hidden_act": "relu", "num_attention_heads": 2, "use_parallel_residual": False},
}


@pytest.mark.parametrize(("family", "name"), [(family, name) for family in NUMBERS for name in NUMBERS[family]])
def test_a_configuration_that_was_changed_later(protect: Any, family: str, name: str) -> None:
    """Plain PyTorch does not heed it: the modules have their numbers since they were made."""
    ids, profile = tokens(2, 6), "stream" if name == "use_parallel_residual" else "balanced"
    with wide(), torch.no_grad():
        reference, model = twins_of(family, lora=False)
        for each in (reference, model):
            setattr(each.config, name, NUMBERS[family][name])
        with pytest.raises(UnsupportedModelError, match="is not as its configuration makes it"):
            protect(model, profile=profile)
        with protect(model, profile="strict") as protected:
            assert error(protected.model(input_ids=ids).logits, reference(input_ids=ids).logits) < EXACT


# The head stays in the enclave under each of them, by the same code.
@pytest.mark.parametrize(
    "profile", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("paper", "stream")), "balanced", "shared"]
)
@pytest.mark.parametrize("change", ["hook", "forward"])
def test_a_change_of_the_head_is_kept(protect: Any, change: str, profile: str) -> None:
    with wide(), torch.no_grad():
        reference, model = twins_of("llama", lora=False)
        ids = tokens(2, 6)
        unchanged = reference(input_ids=ids).logits
        for each in (reference, model):
            head = each.get_output_embeddings()
            if change == "hook":
                head.register_forward_hook(lambda module, args, output: 3 * output)
            else:
                head.forward = lambda x, head=head: 3 * torch.nn.functional.linear(x, head.weight, head.bias)
        more = {"worker": "spawn"} if profile == "shared" else {}
        with (
            pytest.warns(UserWarning) if more else contextlib.nullcontext(),
            protect(model, profile=profile, **more) as p,
        ):
            expected = reference(input_ids=ids).logits
            assert error(p.model(input_ids=ids).logits, expected) < (1e-5 if more else EXACT)
        assert error(unchanged, expected) > 0.5  # the control


def test_a_dropout_of_one_module_is_warned_of(protect: Any) -> None:
    model = model_of("llama", lora=False)
    model.model.layers[1].self_attn.attention_dropout = 0.3
    with pytest.warns(UserWarning, match="attention_dropout > 0 cannot be run"), protect(model):
        pass


def test_a_hook_within_an_adapter_that_leaves(protect: Any) -> None:
    model = model_of("llama")
    lora = model.get_base_model().model.layers[0].self_attn.q_proj
    lora.lora_A["default"].register_forward_hook(lambda module, args, output: 2 * output)
    for profile in ("paper", "balanced", "stream"):
        with pytest.raises(UnsupportedModelError, match=r"a hook.*q_proj\.lora_A\.default"):
            protect(model, profile=profile)


def test_a_class_of_its_own_is_named(protect: Any) -> None:
    class Sparse(GPT2MLP):
        pass

    model = model_of("gpt2")
    model.get_base_model().transformer.h[1].mlp.__class__ = Sparse
    with pytest.raises(UnsupportedModelError, match=r"a class of its own.*Sparse.*transformer\.h\.1\.mlp"):
        protect(model)


@pytest.mark.parametrize(
    ("kind", "profiles"),
    [
        (LlamaAttention, WHOLE),
        (LlamaMLP, WHOLE),
        (LlamaRMSNorm, WHOLE),
        (LlamaDecoderLayer, ("stream",)),
        (torch.nn.Linear, (*WHOLE, *LINEAR)),
    ],
)
def test_a_forward_set_on_a_class(
    protect: Any, monkeypatch: pytest.MonkeyPatch, kind: type[torch.nn.Module], profiles: tuple[str, ...]
) -> None:
    """As libraries of kernels do it; a decorator would keep the name of the module that the method is from."""
    reference, model = twins_of("llama", dtype=torch.float32)
    ids, own = tokens(2, 6), kind.forward

    @functools.wraps(own)
    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = own(self, *args, **kwargs)
        return (2 * found[0], *found[1:]) if isinstance(found, tuple) else 2 * found

    monkeypatch.setattr(kind, "forward", doubled)
    for profile in (*WHOLE, *LINEAR):
        if profile in profiles:
            with pytest.raises(UnsupportedModelError, match=rf"set on {kind.__name__}.*test_changed_code.*layers\.0"):
                protect(copy.deepcopy(model), profile=profile)
            continue
        with protect(copy.deepcopy(model), profile=profile) as protected, torch.no_grad():
            assert error(protected.model(input_ids=ids).logits, reference(input_ids=ids).logits) < FLOAT32


@pytest.mark.parametrize("name", ["apply_rotary_pos_emb", "rotate_half", "eager_attention_forward"])
def test_a_function_that_was_replaced(protect: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As libraries of kernels do it too; the forward calls it, or calls what calls it."""
    reference, model = twins_of("llama", dtype=torch.float32)
    for each in (reference, model):
        each.set_attn_implementation("eager")
    ids, own = tokens(2, 6), getattr(modeling_llama, name)
    unchanged = reference(input_ids=ids).logits

    @functools.wraps(own)
    def doubled(*args: Any, **kwargs: Any) -> Any:
        found = own(*args, **kwargs)
        return (2 * found[0], *found[1:]) if isinstance(found, tuple) else 2 * found

    monkeypatch.setattr(modeling_llama, name, doubled)
    with torch.no_grad():
        expected = reference(input_ids=ids).logits
        assert error(unchanged, expected) > CHANGED
        for profile in WHOLE:
            with pytest.raises(UnsupportedModelError, match=rf"replaced, {name}.*test_changed_code.*layers\.0"):
                protect(copy.deepcopy(model), profile=profile)
        for profile in LINEAR:
            with protect(copy.deepcopy(model), profile=profile) as protected:
                assert error(protected.model(input_ids=ids).logits, expected) < FLOAT32


def test_a_method_that_was_replaced(protect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of PEFT's layer here: stock attention and MLPs have none but their forward."""
    model = model_of("llama", dtype=torch.float32)
    monkeypatch.setattr(LoraLinear, "_check_forward_args", lambda self, *args, **kwargs: None)
    with pytest.raises(UnsupportedModelError, match=r"replaced, _check_forward_args.*test_changed_code.*layers\.0"):
        protect(model, profile="balanced")


@pytest.mark.parametrize("profile", ["balanced", "stream", "strict"])
def test_hooks_that_transformers_leaves_do_not_matter(protect: Any, profile: str) -> None:
    ids = tokens(2, 6)
    with wide(), torch.no_grad():
        reference, model = twins_of("llama")
        model(input_ids=ids, output_hidden_states=True)
        assert model.get_base_model().model.layers[0]._forward_hooks  # the control: it has left some
        with protect(model, profile=profile) as protected:
            assert error(protected.model(input_ids=ids).logits, reference(input_ids=ids).logits) < EXACT


def without_masks(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, {**kwargs, "attention_mask": None}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_blocks_without_a_mask(protect: Any, family: str) -> None:
    """Stock eager attention (Gemma 2) is not causal then, and torch's is not where there are cached tokens."""
    reference, model = twins_of(family)
    ids, more = tokens(2, 6), tokens(2, 3, seed=4)
    with wide(), torch.no_grad(), protect(model, profile="balanced") as protected:
        caches = [each(ids, use_cache=True).past_key_values for each in (reference, protected.model)]
        handles = [
            block.register_forward_pre_hook(without_masks, with_kwargs=True)
            for each in (reference, protected.model)
            for block in each.get_base_model().model.layers
        ]
        found, expected = (
            each(more[:, :1], past_key_values=cache).logits
            for each, cache in zip((protected.model, reference), reversed(caches), strict=True)
        )
        assert error(found, expected) < EXACT  # one token looks at all cached ones
        with pytest.raises(UnsupportedModelError, match="no attention mask, where stock attention is not causal"):
            protected.model(more, past_key_values=caches[1])
        if family == "gemma2":
            with pytest.raises(UnsupportedModelError, match="no attention mask, where stock attention is not causal"):
                protected.model(ids)
        else:
            assert error(protected.model(ids).logits, reference(ids).logits) < EXACT
        for handle in handles:
            handle.remove()
        assert error(protected.model(ids).logits, reference(ids).logits) < EXACT
