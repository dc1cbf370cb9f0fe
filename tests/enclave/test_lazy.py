"""A model that is read layer by layer is the same model, and never holds all of its plain weights."""

import weakref
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from transformers import MixtralConfig

import obfuscatune
from obfuscatune.enclave.lazy import lazy_weights, load_lazily
from obfuscatune.errors import UnsupportedModelError, UsageError
from obfuscatune.profiles import resolve

from ..exactness.conftest import listening
from ..exactness.models import VARIANTS, gpt2, with_lora


@pytest.fixture(scope="module")
def protect(tmp_path_factory) -> Iterator[partial]:
    """`obfuscatune.protect` with one worker for all tests of this file."""
    with listening(tmp_path_factory.mktemp("worker")) as address:
        yield partial(obfuscatune.protect, worker=address, timeout=60.0)


class Source:
    """Tensors of a state dict, with a record of what was read."""

    def __init__(self, tensors):
        self.tensors, self.read, self.given = tensors, [], []

    def names(self):
        return self.tensors.keys()

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def get(self, name):
        self.read.append(name)
        tensor = self.tensors[name].clone()
        if ".h." in name and tensor.ndim == 2:
            self.given.append(weakref.ref(tensor.untyped_storage()))
        return tensor


def tensors_of(model, prefix="transformer."):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    return {prefix + name.removeprefix("transformer."): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("variant", ["balanced", "paper", "balanced, first block inside", "stream", "enclave"])
def test_logits_and_gradients_are_those_of_the_whole_model(protect, variant, prefix):
    name, switches = VARIANTS[variant]
    plain = with_lora(gpt2())
    profile = resolve(name, **switches)
    model = load_lazily(gpt2().config, Source(tensors_of(gpt2(), prefix)), torch.float64)
    ids = torch.randint(37, (2, 11), generator=torch.Generator().manual_seed(0))
    protect = protect if profile.remote else obfuscatune.protect
    with protect(with_lora(model), profile=profile) as protected:
        ours = protected.model(ids, labels=ids)
        theirs = plain(ids, labels=ids)
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-9, atol=1e-9)
        if profile.lora_placement != "worker":
            ours.loss.backward()
            theirs.loss.backward()
            lora = {key: p.grad for key, p in protected.model.named_parameters() if "lora_" in key}
            assert len(lora) == 2 * 2 * 4  # factors, blocks, layers
            for key, grad in lora.items():
                torch.testing.assert_close(grad, plain.get_parameter(key).grad, rtol=1e-9, atol=1e-9)


def test_large_weights_are_read_when_they_are_keyed_and_dropped_then(protect):
    source = Source(tensors_of(gpt2()))
    model = load_lazily(gpt2().config, source, torch.float64)
    large = [name for name in source.names() if ".h." in name and source.tensors[name].ndim == 2]
    assert large and not set(large) & set(source.read)
    weight = model.transformer.h[0].attn.c_attn.weight
    with protect(model, profile="balanced"):
        assert sorted(name for name in source.read if name in large) == sorted(large)  # each once
        assert weight.untyped_storage().nbytes() == weight.element_size()
        assert source.given and all(alive() is None for alive in source.given)
        assert lazy_weights(model) is None


def test_until_then_nothing_computes_with_them():
    model = load_lazily(gpt2().config, Source(tensors_of(gpt2())), torch.float64)
    ids = torch.ones(1, 3, dtype=torch.int64)
    for called in (model, model.transformer, with_lora(model)):
        with pytest.raises(UsageError, match="not read yet"):
            called(ids)
    assert model.transformer.h[1].mlp.c_fc.weight.isnan().all()


@pytest.mark.parametrize("profile", ["balanced", "enclave"])
def test_a_weight_that_an_adapter_has_changed_is_refused(profile):
    model = load_lazily(gpt2().config, Source(tensors_of(gpt2())), torch.float64)
    model.transformer.h[1].mlp.c_fc.weight.data = torch.zeros(15, 60, dtype=torch.float64)
    with pytest.raises(UsageError, match=r"changed before it was read.*transformer.h.1.mlp.c_fc.weight"):
        obfuscatune.protect(model, profile=profile)


def test_after_a_failure_the_model_can_be_protected_again(protect):
    source = Source(tensors_of(gpt2()))
    model = load_lazily(gpt2().config, source, torch.float64)
    broken = source.tensors.pop("transformer.h.1.mlp.c_proj.weight")
    with pytest.raises(KeyError):
        protect(model, enclave_blocks=1, key_block=4)
    assert model.transformer.h[1].mlp.c_fc.weight.isnan().all()
    source.tensors["transformer.h.1.mlp.c_proj.weight"] = broken
    ids = torch.ones(1, 3, dtype=torch.int64)
    with protect(model, key_block=4) as protected:
        torch.testing.assert_close(protected.model(ids).logits, gpt2()(ids).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("transformer.ln_f.weight"), "missing"),
        (lambda t: t.update({"transformer.wpe.weight": torch.zeros(3, 3)}), "another shape"),
        (lambda t: t.update({"transformer.extra": torch.zeros(3)}), "not of this model"),
        (lambda t: t.update({"transformer.ln_f.bias": torch.zeros(15, dtype=torch.int64)}), "no floating-point"),
    ],
)
def test_tensors_of_another_model_are_refused(change, message):
    tensors = tensors_of(gpt2())
    change(tensors)
    with pytest.raises(UnsupportedModelError, match=message):
        load_lazily(gpt2().config, Source(tensors), torch.float64)


def test_experts_are_refused_for_what_they_are():
    """And not for tensors that have other names in files than in the model."""
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=37, **sizes, num_key_value_heads=2, num_local_experts=2)
    with pytest.raises(UnsupportedModelError, match=r"not those of a linear layer.*layers\.0\.mlp"):
        load_lazily(config, Source({"model.embed_tokens.weight": torch.zeros(37, 32)}), torch.float32)
