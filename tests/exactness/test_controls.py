"""Negative controls: each way to break a key or a correction fails the comparison that the other tests make.

Each has its intact counterpart in the same test, so that it is the damage that fails it.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from obfuscatune.enclave.folding import KeyedAttention
from obfuscatune.enclave.keys import MasterSecret, build
from obfuscatune.enclave.recipes import whole
from obfuscatune.enclave.remote import lora
from obfuscatune.enclave.remote.linear import RemoteLinear
from obfuscatune.enclave.remote.whole import RemoteAttention, RemoteMlp
from obfuscatune.enclave.session import Session

from .models import VARIANTS, error, tokens, twins

EXACT = 1e-9  # what the tests of exactness ask for
BROKEN = 1e-4  # measured: the least of these controls is 1.4e-2


def remotes(model: Any) -> list[Any]:
    """What holds a segment's name and its keys."""
    found = [m for m in model.modules() if isinstance(m, RemoteLinear | RemoteAttention | RemoteMlp)]
    return [m.group if isinstance(m, RemoteLinear) else m for m in found]


def difference(protect: Any, variant: str, damage: Callable[[Any], None] | None = None) -> float:
    profile, switches = VARIANTS[variant]
    reference, model = twins()
    with protect(model, profile=profile, **switches) as protected, torch.no_grad():
        if damage is not None:
            damage(protected.model)
        return error(protected.model(input_ids=tokens(2, 5)).logits, reference(input_ids=tokens(2, 5)).logits)


def wrong_input_key(model: Any) -> None:
    remote = remotes(model)[0]
    key = build("haar", MasterSecret.generate().stream("another"), remote.placed.key_in.size)
    remote.placed = replace(remote.placed, key_in=key)


def wrong_output_key(model: Any) -> None:
    remote = remotes(model)[-1]
    key = build("haar", MasterSecret.generate().stream("another"), remote.placed.key_out.size)
    remote.placed = replace(remote.placed, key_out=key)


def of_both_blocks(model: Any) -> tuple[Any, Any]:
    return tuple(next(r for r in remotes(model) if f".h.{block}." in r.placed.path) for block in (0, 1))


def keys_of_another_layer(model: Any) -> None:
    first, other = of_both_blocks(model)
    one, two = first.placed, other.placed
    first.placed, other.placed = replace(one, key_in=two.key_in), replace(two, key_in=one.key_in)


def swapped_layers(model: Any) -> None:
    """The segments of two blocks, with the keys left where they are."""
    first, other = of_both_blocks(model)
    one, two = first.placed, other.placed
    first.placed, other.placed = replace(one, segment=two.segment), replace(two, segment=one.segment)


def no_key(model: Any) -> None:
    remote = remotes(model)[0]
    key = build("identity", MasterSecret.generate().stream("none"), remote.placed.key_in.size)
    remote.placed = replace(remote.placed, key_in=key)


DAMAGES = [wrong_input_key, wrong_output_key, keys_of_another_layer, swapped_layers, no_key]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("variant", ["paper, lora enclave", "balanced"])
def test_wrong_keys_and_layers_show(protect: Any, variant: str, damage: Callable[[Any], None]) -> None:
    assert difference(protect, variant) < EXACT
    assert difference(protect, variant, damage) > BROKEN


@pytest.mark.parametrize("kind", ["attention", "mlp", "linear"])
@pytest.mark.parametrize("name", ["weight", "first", "first_bias", "last"])
def test_one_corrupted_keyed_weight_shows(protect: Any, monkeypatch: pytest.MonkeyPatch, kind: str, name: str) -> None:
    if (kind == "linear") != (name == "weight"):
        return
    original, hit = Session.request, []

    def corrupting(self: Session, op: str, layer: str, header: Any, tensors: Any, expected: Any) -> Any:
        if op == "define" and header["kind"] == kind and not hit:
            hit.append(layer)
            tensors = {**tensors, name: tensors[name].clone()}
            tensors[name].view(-1)[0] += 1.0
        return original(self, op, layer, header, tensors, expected)

    variant = "paper, lora enclave" if name == "weight" else "balanced"
    assert difference(protect, variant) < EXACT
    monkeypatch.setattr(Session, "request", corrupting)
    assert difference(protect, variant) > BROKEN
    assert len(hit) == 1


def test_the_value_offset_is_needed_in_bias_and_adapter(protect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it in the output's bias the base model is wrong; without it in LoRA's input only the adapter is."""
    original = whole.key_attention

    def without_offset(**arguments: Any) -> KeyedAttention:
        keyed = original(**arguments)
        return replace(keyed, value_offset=torch.zeros_like(keyed.value_offset))

    def without_bias(**arguments: Any) -> KeyedAttention:
        keyed = original(**arguments)
        return replace(keyed, bias=arguments["last"][1].double())

    assert difference(protect, "balanced") < EXACT
    monkeypatch.setattr(whole, "key_attention", without_offset)
    assert difference(protect, "balanced") > BROKEN
    monkeypatch.setattr(whole, "key_attention", without_bias)
    assert difference(protect, "balanced") > BROKEN


def test_the_norms_own_output_is_what_lora_sees(protect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA on normalized rows, without gain and bias, is another adapter."""
    original = lora.SplitInput.contribute
    normalized = lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:])  # noqa: E731
    monkeypatch.setattr(lora.SplitInput, "contribute", lambda self, call, x: original(self, call, normalized(x)))
    assert difference(protect, "balanced") > BROKEN


def test_stale_factors_show(protect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that goes on with factors it was sent before is seen by the tests of staleness."""
    reference, model = twins()
    with protect(model) as protected, torch.no_grad():
        protected.model(input_ids=tokens(1, 3))
        monkeypatch.setattr(lora._Sent, "is_of", lambda *arguments: True)
        for each in (reference, protected.model):
            for name, parameter in each.named_parameters():
                if "lora_B" in name and "c_attn" in name:
                    parameter.mul_(2)
        got, expected = (each(input_ids=tokens(1, 3)).logits for each in (protected.model, reference))
        assert error(got, expected) > BROKEN
