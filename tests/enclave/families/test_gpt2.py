"""The GPT-2 record against the model itself: every path exists, every shape and number is the model's own."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig
from transformers.pytorch_utils import Conv1D

from obfuscatune import UnsupportedModelError
from obfuscatune.enclave.families import FAMILIES, family_of


def config(**changes: object) -> GPT2Config:
    return GPT2Config(**{"vocab_size": 11, "n_embd": 15, "n_head": 3, "n_layer": 3, "n_positions": 8, **changes})


def test_the_registry_is_by_model_type() -> None:
    assert family_of(config()) is FAMILIES["gpt2"]
    assert all(name == spec.model_type for name, spec in FAMILIES.items())


def test_unknown_families_are_refused_with_those_known() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'llama'.*gpt2"):
        family_of(LlamaConfig())
    with pytest.raises(UnsupportedModelError, match="model_type None"):
        family_of(object())


def test_cross_attention_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="add_cross_attention"):
        family_of(config(add_cross_attention=True))


@pytest.mark.parametrize("inner", [None, 7])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_roles_shapes_and_scale_are_the_models(inner: int | None, inverse: bool, scaled: bool) -> None:
    cfg = config(n_inner=inner, scale_attn_by_inverse_layer_idx=inverse, scale_attn_weights=scaled)
    with torch.device("meta"):
        model = GPT2LMHeadModel(cfg)
    spec = family_of(cfg)
    width, hidden = spec.width(cfg), spec.hidden(cfg)
    assert isinstance(model.get_submodule(spec.final_norm), nn.LayerNorm)
    blocks = list(spec.iter_blocks(model))
    assert [index for index, _, _ in blocks] == [0, 1, 2]
    for index, path, block in blocks:
        assert model.get_submodule(path) is block
        for norm in (spec.attention_norm, spec.mlp_norm):
            assert isinstance(block.get_submodule(norm), nn.LayerNorm)
        found = [block.get_submodule(parent).get_submodule(child) for parent, child in spec.linears()]
        assert all(isinstance(linear, Conv1D) for linear in found)
        shapes = [tuple(spec.weight_in_out(linear).shape) for linear in found]
        assert shapes == [(width, 3 * width), (width, width), (width, hidden), (hidden, width)]
        attention, shape = block.get_submodule(spec.attention), spec.attention_shape(cfg, index)
        assert (shape.heads, shape.head_dim) == (attention.num_heads, attention.head_dim)
        assert shape.scale == pytest.approx(attention.scaling, rel=1e-15)
    assert hasattr(cfg, spec.attention_dropout)
    assert spec.activation(cfg) == cfg.activation_function


def test_weights_are_seen_and_not_copied() -> None:
    spec = FAMILIES["gpt2"]
    linear = Conv1D(4, 3)
    assert spec.weight_in_out(linear).data_ptr() == linear.weight.data_ptr()
