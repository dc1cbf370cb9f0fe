"""The rotated residual stream: one call a pass, what it may not show, and each way to break it, which must be seen.

That it is exact the tests of all profiles say. Damages have their intact counterpart in the same test.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from obfuscatune import UnsupportedModelError
from obfuscatune.enclave.folding import centre
from obfuscatune.enclave.keys import MasterSecret, build
from obfuscatune.enclave.recipes import stream
from obfuscatune.enclave.remote.body import PassedBlock, RemoteBody
from obfuscatune.enclave.session import Session

from .models import VARIANTS, error, gpt2, gradients, randomize_lora, scalar, tokens, twins, with_lora, worst

EXACT = 1e-9  # float64, relative; measured 5e-14
BROKEN = 1e-4  # the least of the damages


def body_of(model: Any) -> RemoteBody:
    (body,) = (module for module in model.modules() if isinstance(module, RemoteBody))
    return body


def difference(protect: Any, damage: Callable[[Any], None] | None = None, variant: str = "stream") -> float:
    profile, switches = VARIANTS[variant]
    reference, model = twins()
    with protect(model, profile=profile, **switches) as protected, torch.no_grad():
        if damage is not None:
            damage(protected.model)
        return error(protected.model(input_ids=tokens(2, 5)).logits, reference(input_ids=tokens(2, 5)).logits)


@pytest.fixture
def pair(protect: Any) -> Iterator[tuple[Any, Any]]:
    reference, model = twins(n_layer=3)
    with protect(model, profile="stream") as protected:
        yield reference, protected


def test_another_norm_of_any_block_gets_another_rotation(protect: Any) -> None:
    rotations = []
    for scale in (1.0, 1.0, 1.5):
        model = gpt2()
        model.transformer.h[-1].ln_2.weight.data.mul_(scale)
        with protect(model, profile="stream") as protected:
            rotations.append(body_of(protected.model).placed.key_in.dense())
    assert torch.equal(rotations[0], rotations[1])
    assert not torch.allclose(rotations[1], rotations[2])


def test_one_request_a_pass(pair: tuple[Any, Any]) -> None:
    protected = pair[1]
    counts = []
    for _ in range(2):
        scalar(protected.model(input_ids=tokens(2, 5)).logits).backward()
        counts.append({op: protected.session.traffic[op].calls for op in ("forward", "backward")})
    assert counts == [{"forward": 1, "backward": 1}, {"forward": 2, "backward": 2}]
    prompt = {"input_ids": tokens(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    protected.model.generate(**prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert protected.session.traffic["forward"].calls == 2 + 6


def test_what_comes_back_is_the_plain_body_less_the_mean_of_its_rows(pair: tuple[Any, Any]) -> None:
    found: list[Tensor] = []
    for model in (pair[0], pair[1].model):
        norm = model.get_base_model().transformer.ln_f
        handle = norm.register_forward_pre_hook(lambda _, args: found.append(args[0]))
        with torch.no_grad():
            model(input_ids=tokens(2, 5))
        handle.remove()
    assert error(found[1], centre(found[0])) < EXACT
    assert found[0].mean(-1).abs().min() > 1e-3  # so that it is another tensor than the plain one
    assert error(found[1], found[0]) > BROKEN


def test_nothing_lies_along_the_direction_that_centring_shows(protect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and factors write nothing to it, so it is known; and read nothing from it, so it tells nothing."""
    crossed: dict[str, list[Tensor]] = {}
    original = Session.request

    def noting(self: Session, op: str, layer: str, header: Any, tensors: Any, expected: Any) -> Any:
        for name, tensor in tensors.items():
            crossed.setdefault(name, []).append(tensor.clone())
        return original(self, op, layer, header, tensors, expected)

    monkeypatch.setattr(Session, "request", noting)
    with protect(twins()[1], profile="stream") as protected, torch.no_grad():
        protected.model(input_ids=tokens(2, 5))
        direction = body_of(protected.model).placed.key_in.apply(torch.ones(15, dtype=torch.float64))
    reads = ["first", "A.0.in0", "A.1.in0"]
    writes = ["last", "bias", "x", "B.0.out", "B.1.out"]
    for name in reads:
        for tensor in crossed[name]:
            assert (direction @ tensor).abs().max() < EXACT * tensor.abs().max(), name
    for name in writes:
        for tensor in crossed[name]:
            assert (tensor @ direction).abs().max() < EXACT * tensor.abs().max(), name
    assert (crossed["first"][0].T @ centre(direction)).abs().max() > BROKEN  # another direction


def test_names_and_weights_of_the_adapter_stay(pair: tuple[Any, Any]) -> None:
    plain, ours = (dict(model.named_parameters()) for model in (pair[0], pair[1].model))
    assert set(ours) <= set(plain)
    assert {name for name in plain if "lora_" in name or ".ln_" in name} <= set(ours)
    assert not any("c_attn" in name and "lora_" not in name for name in ours)
    blocks = list(pair[1].model.get_base_model().transformer.h)
    assert [type(block) for block in blocks] == [RemoteBody, PassedBlock, PassedBlock]


def test_a_factor_is_part_of_what_is_compared(protect: Any) -> None:
    """Two adapters of equal values and unequal scale: the one that the worker has is not the other."""
    reference, model = twins()
    for each in (reference, model):
        each.add_adapter("second", type(each.peft_config["default"])(**{
            "r": 3, "lora_alpha": 50, "target_modules": list(each.peft_config["default"].target_modules),
            "fan_in_fan_out": True,
        }))  # fmt: skip
        each.to(torch.float64)
        for name in ("default", "second"):
            randomize_lora(each, seed=8, adapter=name)
    with protect(model, profile="stream") as protected, torch.no_grad():
        logits = []
        for name in ("default", "second"):
            for each in (reference, protected.model):
                each.set_adapter(name)
            logits.append(protected.model(input_ids=tokens(2, 5)).logits)
            assert error(logits[-1], reference(input_ids=tokens(2, 5)).logits) < EXACT
        assert error(logits[1], logits[0]) > 1e-3


def test_factors_cross_only_where_they_changed(pair: tuple[Any, Any]) -> None:
    sent = []
    with torch.no_grad():
        for _ in range(2):
            before = pair[1].session.traffic["forward"].bytes_sent
            pair[1].model(input_ids=tokens(1, 1))
            sent.append(pair[1].session.traffic["forward"].bytes_sent - before)
    factors = sum(p.numel() for name, p in pair[0].named_parameters() if "lora_" in name) * 8
    assert sent[0] - sent[1] > factors


def test_checkpointing_is_the_workers(protect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One forward request, whose field says it, and not a second forward as of blocks in the enclave."""
    asked: list[bool] = []
    original = Session.request

    def noting(self: Session, op: str, layer: str, header: Any, tensors: Any, expected: Any) -> Any:
        if op == "forward":
            asked.append(header["recompute"])
        return original(self, op, layer, header, tensors, expected)

    monkeypatch.setattr(Session, "request", noting)
    reference, model = twins()
    with protect(model, profile="stream") as protected:
        for each in (reference, protected.model):
            each.train()
            scalar(each(input_ids=tokens(2, 5)).logits).backward()
            each.activation_checkpointing_enable()
            scalar(each(input_ids=tokens(2, 5)).logits).backward()
        assert worst(gradients(protected.model), gradients(reference)) < EXACT
        protected.model.eval()
        protected.model(input_ids=tokens(2, 5))
    assert asked == [False, True, False]


# Dropout and norms


def test_all_dropout_of_blocks_is_off_with_one_warning(protect: Any) -> None:
    dropout = {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1}
    model = with_lora(gpt2(**dropout), lora_dropout=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        protected = protect(model, profile="stream")
    assert [(w.category, w.filename) for w in caught] == [(UserWarning, __file__)]
    for name in ("attn_pdrop", "attn.resid_dropout", "mlp.dropout", "lora_dropout", "rotate_stream=False"):
        assert name in str(caught[0].message)
    reference = with_lora(gpt2(embd_pdrop=0.1))  # which is kept, and draws the same numbers
    with protected:
        for each in (reference, protected.model):
            each.train()
            torch.manual_seed(3)
            scalar(each(input_ids=tokens(2, 5)).logits).backward()
        assert worst(gradients(protected.model), gradients(reference)) < EXACT


def test_a_final_norm_that_sees_the_mean_is_refused(protect: Any) -> None:
    model = gpt2()
    model.transformer.ln_f = nn.RMSNorm(15).double()
    with pytest.raises(UnsupportedModelError, match="the final norm, RMSNorm, sees the mean of a row"):
        protect(model, profile="stream")
    with protect(model, profile="balanced"):  # where it is the enclave's business
        pass


# Negative controls


def wrong_key(model: Any) -> None:
    body = body_of(model)
    key = build("haar", MasterSecret.generate().stream("another"), body.placed.key_in.size)
    body.placed = replace(body.placed, key_in=key)


def no_key(model: Any) -> None:
    body = body_of(model)
    key = build("identity", MasterSecret.generate().stream("none"), body.placed.key_in.size)
    body.placed = replace(body.placed, key_in=key, key_out=key)


def pair_of(model: Any, slot: str) -> Any:
    return next(pair for pair in body_of(model)._slots if pair.name == slot)


def no_gain(model: Any) -> None:
    pair_of(model, "0.in0")._gain = None


def no_shift(model: Any) -> None:
    pair = pair_of(model, "1.in0")
    pair._shift = torch.zeros_like(pair._shift)


def no_offset(model: Any) -> None:
    pair = pair_of(model, "0.out")
    pair._shift = torch.zeros_like(pair._shift)


def not_centred(model: Any) -> None:
    pair_of(model, "1.out")._centred_out = False


def swapped_slots(model: Any) -> None:
    first, second = pair_of(model, "1.in0"), pair_of(model, "3.in0")
    first.name, second.name = second.name, first.name


DAMAGES = [wrong_key, no_key, no_gain, no_shift, no_offset, not_centred, swapped_slots]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_shows(protect: Any, damage: Callable[[Any], None]) -> None:
    assert difference(protect) < EXACT
    assert difference(protect, damage) > BROKEN


@pytest.mark.parametrize("what", ["weights and biases that write", "bias of the body", "eps of the body"])
def test_a_body_keyed_wrongly_shows(protect: Any, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    original = Session.request

    def corrupting(self: Session, op: str, layer: str, header: Any, tensors: Any, expected: Any) -> Any:
        if header.get("kind") == "body" and what == "bias of the body":
            tensors = {"bias": torch.zeros_like(tensors["bias"])}
        elif header.get("kind") == "body":
            header = {**header, "spec": {**header["spec"], "eps": [0.1] * len(header["spec"]["eps"])}}
        return original(self, op, layer, header, tensors, expected)

    assert difference(protect) < EXACT
    if what == "weights and biases that write":
        monkeypatch.setattr(stream, "centre", lambda rows: rows)
    else:
        monkeypatch.setattr(Session, "request", corrupting)
    assert difference(protect) > BROKEN
