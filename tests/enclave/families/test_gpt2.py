"""The GPT-2 record against the model itself: every path exists, every shape and number is the model's own."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from obfuscatune import UnsupportedModelError
from obfuscatune.enclave.families import FAMILIES, family_of, read_decoder
from obfuscatune.enclave.families.form import Layer


def config(**changes: object) -> GPT2Config:
    return GPT2Config(**{"vocab_size": 11, "n_embd": 15, "n_head": 3, "n_layer": 3, "n_positions": 8, **changes})


def test_the_registry_is_by_model_type() -> None:
    assert family_of(config()) is FAMILIES["gpt2"]
    assert all(name == spec.model_type for name, spec in FAMILIES.items())


def test_unknown_families_are_refused_with_those_known() -> None:
    with pytest.raises(UnsupportedModelError, match=r"model_type None.*gpt2"):
        family_of(object())


def test_cross_attention_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="add_cross_attention"):
        family_of(config(add_cross_attention=True))


def test_quantized_models_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="quantization_config"):
        family_of(config(quantization_config={"quant_method": "bitsandbytes"}))


@pytest.mark.parametrize("inner", [None, 7])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_roles_shapes_and_scale_are_the_models(inner: int | None, inverse: bool, scaled: bool) -> None:
    cfg = config(n_inner=inner, scale_attn_by_inverse_layer_idx=inverse, scale_attn_weights=scaled)
    with torch.device("meta"):
        model = GPT2LMHeadModel(cfg)
    decoder = read_decoder(model)
    width, hidden = decoder.width, inner or 60
    assert width == 15
    assert isinstance(model.get_submodule(decoder.final_norm or ""), nn.LayerNorm)
    assert [block.index for block in decoder.blocks] == [0, 1, 2]
    for index, block in enumerate(decoder.blocks):
        assert model.get_submodule(block.path) is block.module
        attention, mlp = block.attention, block.mlp
        assert attention is not None and mlp is not None
        for norm in (attention.norm, mlp.norm):
            assert norm.module is model.get_submodule(norm.path)
        for layer in block.layers:
            assert type(layer.base) is Conv1D
            assert model.get_submodule(layer.path) is layer.base
        assert [layer.shape for layer in block.layers] == [
            (width, 3 * width),
            (width, width),
            (width, hidden),
            (hidden, width),
        ]
        module = model.transformer.h[index].attn
        shape = attention.shape
        assert (shape.heads, shape.kv_heads, shape.head_dim) == (module.num_heads, module.num_heads, module.head_dim)
        assert shape.scale == pytest.approx(module.scaling, rel=1e-15)
        assert hasattr(cfg, attention.dropout_field)
        assert mlp.activation == cfg.activation_function


def test_weights_are_seen_and_not_copied() -> None:
    for linear in (Conv1D(4, 3), nn.Linear(3, 4)):
        layer = Layer(nn.Module(), "x", "x", linear, None)
        assert layer.weight.data_ptr() == linear.weight.data_ptr()
        assert layer.shape == (3, 4)
