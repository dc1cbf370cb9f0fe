"""Which models get the same keys from one secret: those of which the same is keyed."""

from typing import Any

import pytest
import torch
from torch import nn

from obfuscatune.enclave.families import Layer, Norm
from obfuscatune.enclave.keys import MasterSecret
from obfuscatune.enclave.recipes.context import Keying
from obfuscatune.profiles import resolve

SECRET = MasterSecret.from_insecure_test_seed(4)


def drawn(profile: str, change: str | None = None) -> bytes:
    nothing: Any = None
    keying = Keying([nothing], resolve(profile), nothing, SECRET, nothing, adapted=False)
    parent = nn.ModuleDict({"norm": nn.LayerNorm(4), "linear": nn.Linear(4, 3)})
    with torch.no_grad():
        for parameter in parent.parameters():
            parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape))
        if change is not None:
            parent.get_parameter(change).mul_(2)
    norm = Norm("layernorm", parent, "norm", "norm", parent["norm"])
    layer = Layer(parent, "linear", "linear", parent["linear"], None)
    return keying.streams("linear", layer, norm=norm)("in").bytes(16)


@pytest.mark.parametrize("change", ["linear.weight", "linear.bias", "norm.weight", "norm.bias"])
def test_another_weight_bias_or_folded_norm_gets_other_keys(change: str) -> None:
    assert drawn("balanced") == drawn("balanced")
    assert drawn("balanced", change) != drawn("balanced")


@pytest.mark.parametrize("change", ["norm.weight", "norm.bias"])
def test_a_norm_that_stays_and_is_trained_changes_no_key(change: str) -> None:
    assert drawn("strict", change) == drawn("strict")
