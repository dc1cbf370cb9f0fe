"""What is changed in place between two calls: heeded or refused, also where torch keeps no count of changes."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from peft.helpers import rescale_adapter_scale
from transformers import AttentionInterface
from transformers.activations import ACT2FN
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from obfuscatune import UnsupportedModelError

from .families import model_of, twins_of
from .models import error, tokens

EXACT = 1e-9  # measured 1e-14
CHANGED = 1e-2  # what each change does to the plain model; measured .3 and more

pytestmark = pytest.mark.filterwarnings("ignore")


def add_one(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    kwargs["hidden_states"].add_(1)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_output_of_a_folded_norm_is_refused(protect: Any, context: Any) -> None:
    with protect(model_of("llama"), profile="balanced") as protected, context():
        attention = protected.model.get_base_model().model.layers[1].self_attn
        steer = attention.register_forward_pre_hook(add_one, with_kwargs=True)
        with pytest.raises(UnsupportedModelError, match=r"did not come from its norm .at model.layers.1.self_attn"):
            protected.model(tokens(2, 6))
        steer.remove()
        protected.model(tokens(2, 6))


@pytest.mark.parametrize("profile", ["paper", "strict"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_input_of_layers_that_share_one_is_heeded(protect: Any, profile: str, context: Any) -> None:
    reference, model = twins_of("llama")
    before = reference(tokens(2, 6)).logits

    def doubled(mlp: Any, x: torch.Tensor) -> torch.Tensor:
        gate = mlp.gate_proj(x)
        x.mul_(2)
        return mlp.down_proj(mlp.act_fn(gate) * mlp.up_proj(x))

    with protect(model, profile=profile) as protected, context():
        for each in (reference, protected.model):
            mlp = each.get_base_model().model.layers[0].mlp
            mlp.forward = lambda x, mlp=mlp: doubled(mlp, x)
        got, expected = (each(tokens(2, 6)).logits for each in (protected.model, reference))
        assert error(got, expected) < EXACT and error(before, expected) > CHANGED


def no_change(model: Any) -> Any:
    return nullcontext()


def switched_off(model: Any) -> Any:
    return model.disable_adapter()


def rescaled(model: Any) -> Any:
    return rescale_adapter_scale(model, 0.5)


@contextmanager
def written(model: Any) -> Iterator[None]:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.mul_(2)
    yield


@contextmanager
def replaced(model: Any) -> Iterator[None]:
    for name, module in model.named_modules():
        if name.endswith("lora_B.default"):
            module.weight = torch.nn.Parameter(2 * module.weight.detach())
    yield


@contextmanager
def without_dropout(model: Any) -> Iterator[None]:
    model.eval()
    yield


LINEARS = {"attention": "enclave", "mlp": "enclave", "fold_norms": False, "key_block": 4}


@pytest.mark.parametrize("change", [no_change, switched_off, rescaled, written, replaced, without_dropout])
@pytest.mark.parametrize(
    "switches", [{"profile": "paper"}, {"lora_placement": "split", **LINEARS}], ids=["paper", "split"]
)
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_the_adapter_between_layers_that_share_an_input_is_heeded(
    protect: Any, switches: dict[str, Any], change: Any, context: Any
) -> None:
    """As heads of one layer are looked at by hand: the layers called by themselves, on one x."""
    dropout = 0.5 if change is without_dropout else 0.0
    reference, model = twins_of("llama", lora_dropout=dropout)
    x = torch.randn(2, 6, reference.config.hidden_size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found = []
    with protect(model, **switches), context():
        for each in (reference, model):
            block = each.get_base_model().model.layers[0]
            each.train(change is without_dropout)
            q, gate = block.self_attn.q_proj(x), block.mlp.gate_proj(x)
            with change(each):
                found.append([block.self_attn.k_proj(x), block.mlp.up_proj(x), block.self_attn.v_proj(x)])
            if not dropout:
                found[-1] += [q, gate]
    for got, expected in zip(found[1], found[0], strict=True):
        assert error(got, expected) < EXACT


@pytest.mark.parametrize("profile", ["balanced", "stream"])
def test_a_mask_is_heeded(protect: Any, profile: str) -> None:
    reference, model = twins_of("gpt2")
    with protect(model, profile=profile) as protected:
        outputs = []
        with torch.inference_mode():
            made = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
        kept = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril().numpy()
        for context, mask in ((torch.inference_mode, made), (torch.no_grad, torch.from_numpy(kept))):
            with context():
                outputs += [protected.model(tokens(2, 6), attention_mask=mask).logits]
                mask.numpy()[0, 0, 4, 1] = False
                outputs += [protected.model(tokens(2, 6), attention_mask=mask).logits]
                expected = reference(tokens(2, 6), attention_mask=mask).logits
            assert error(outputs[-1], expected) < EXACT and error(outputs[-2], expected) > CHANGED


@pytest.mark.parametrize("profile", ["plain", "balanced", "stream"])
def test_attention_of_the_callers_own_is_refused_before_and_after(protect: Any, profile: str) -> None:
    def sharp(module: Any, *args: Any, scaling: float, **kwargs: Any) -> Any:
        return sdpa_attention_forward(module, *args, scaling=3 * scaling, **kwargs)

    AttentionInterface.register("sharp", sharp)
    model = model_of("llama")
    model.get_base_model().set_attn_implementation("sharp")
    with pytest.raises(UnsupportedModelError, match="attention of the model's configuration"):
        protect(model, profile=profile)
    model.get_base_model().set_attn_implementation("sdpa")
    with protect(model, profile=profile) as protected, torch.no_grad():
        model.get_base_model().set_attn_implementation("sharp")
        with pytest.raises(UnsupportedModelError, match="attention of the model's configuration"):
            protected.model(tokens(2, 6))
        model.get_base_model().set_attn_implementation("sdpa")
        protected.model(tokens(2, 6))


@pytest.mark.parametrize("profile", ["plain", "balanced", "stream"])
@pytest.mark.parametrize("how", ["sdpa", "eager", "torch"])
def test_attention_under_a_stock_name_is_refused_before_and_after(
    protect: Any, monkeypatch: pytest.MonkeyPatch, how: str, profile: str
) -> None:
    """As packages with fast kernels install theirs."""

    def own(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError

    def replace(patch: pytest.MonkeyPatch) -> None:
        if how == "torch":
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", own)
        else:
            patch.setitem(AttentionInterface._global_mapping, how, own)

    model = model_of("llama")
    with monkeypatch.context() as patch:
        replace(patch)
        with pytest.raises(UnsupportedModelError, match="attention that was replaced"):
            protect(model, profile=profile)
    with protect(model, profile=profile) as protected, torch.no_grad():
        with monkeypatch.context() as patch:
            replace(patch)
            with pytest.raises(UnsupportedModelError, match="attention that was replaced"):
                protected.model(tokens(2, 6))
        protected.model(tokens(2, 6))


@pytest.mark.parametrize("profile", ["balanced", "stream"])
def test_an_activation_in_the_table_is_refused(protect: Any, monkeypatch: pytest.MonkeyPatch, profile: str) -> None:
    class Own(torch.nn.SiLU):
        pass

    with monkeypatch.context() as patch:
        for found, match in ((torch.nn.GELU, 'ACT2FN."silu"'), (Own, "a class of its own|was replaced")):
            patch.setitem(ACT2FN, "silu", found)
            model = model_of("llama")
            with pytest.raises(UnsupportedModelError, match=match):
                protect(model, profile=profile)
    with pytest.raises(UnsupportedModelError, match="a child with a class of its own"):
        protect(model, profile=profile)  # the table is stock again, and the model is not


def test_attention_of_the_callers_own_runs_in_the_enclave(protect: Any) -> None:
    reference, model = twins_of("llama")
    before = reference(tokens(2, 6)).logits

    def blunt(module: Any, *args: Any, scaling: float, **kwargs: Any) -> Any:
        return sdpa_attention_forward(module, *args, scaling=scaling / 3, **kwargs)

    AttentionInterface.register("blunt", blunt)
    for each in (reference, model):
        each.get_base_model().set_attn_implementation("blunt")
    with protect(model, profile="strict") as protected, torch.no_grad():
        got, expected = (each(tokens(2, 6)).logits for each in (protected.model, reference))
    assert error(got, expected) < EXACT and error(before, expected) > CHANGED
