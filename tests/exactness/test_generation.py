"""Masks, padding, KV caches and every way to generate give what the untouched model gives."""

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GPT2LMHeadModel

from obfuscatune import UnsupportedModelError
from obfuscatune.enclave.remote.body import RemoteBody
from obfuscatune.enclave.remote.whole import RemotePart
from obfuscatune.enclave.remote.withdrawn import Departed

from .models import END, VARIANTS, error, tokens, twins

LOGITS = 1e-9  # float64, relative to the largest; measured 4e-14

# Where the cache is, and what is folded, keyed or inside, are what may go wrong here.
KINDS = [
    "plain",
    "paper",
    "balanced",
    "balanced, attention enclave",
    "balanced, first block inside",
    "strict",
    "stream",
    "stream, first block inside",
    "enclave",
]


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, protect: Any) -> Iterator[tuple[Any, Any]]:
    """The reference and the protected model; nothing here trains them."""
    profile, switches = VARIANTS[request.param]
    reference, model = twins()
    with protect(model, profile=profile, **switches) as protected:
        yield reference, protected.model


@pytest.fixture(scope="module")
def balanced(protect: Any) -> Iterator[tuple[Any, Any]]:
    reference, model = twins()
    with protect(model) as protected:
        yield reference, protected.model


def padded(side: str) -> dict[str, torch.Tensor]:
    """Rows of 6, 4 and 1 tokens, padded with the end token."""
    ids, mask = torch.full((3, 6), END), torch.zeros(3, 6, dtype=torch.int64)
    for row, length in enumerate((6, 4, 1)):
        where = slice(6 - length, 6) if side == "left" else slice(0, length)
        ids[row, where], mask[row, where] = tokens(length, seed=row), 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(pair: tuple[Any, Any], side: str) -> None:
    batch = padded(side)
    attended = batch["attention_mask"].bool()
    expected, got = (model(**batch).logits[attended] for model in pair)
    assert error(got, expected) < LOGITS
    for model in pair:
        model.zero_grad()
        model(**batch).logits[attended].square().sum().backward()
    wanted = {name: p.grad for name, p in pair[0].named_parameters() if p.grad is not None}
    for name, parameter in pair[1].named_parameters():
        if name in wanted and parameter.grad is not None:
            assert error(parameter.grad, wanted[name]) < LOGITS, name


def test_a_mask_changes_the_result(pair: tuple[Any, Any]) -> None:
    batch = padded("left")
    with torch.no_grad():
        masked = pair[1](**batch).logits[1, -1]
        assert error(pair[1](input_ids=batch["input_ids"]).logits[1, -1], masked) > 1e-3


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": False, "use_cache": False},
        {"do_sample": True, "top_k": 10, "temperature": 1.3},
        {"do_sample": True, "top_p": 0.9, "num_return_sequences": 3},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "num_beams": 2},
    ],
    ids=lambda how: " ".join(f"{k}={v}" for k, v in how.items()),
)
def test_generation_left_padded(pair: tuple[Any, Any], how: dict[str, Any]) -> None:
    found = []
    for model in pair:
        torch.manual_seed(7)
        found.append(model.generate(**padded("left"), max_new_tokens=8, **how))
    assert torch.equal(*found)


def test_prompt_lookup_crops_the_cache(pair: tuple[Any, Any]) -> None:
    prompt = tokens(4).repeat(3)[None]
    batch = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    found = [model.generate(**batch, max_new_tokens=12, prompt_lookup_num_tokens=3, do_sample=False) for model in pair]
    assert torch.equal(*found)
    plain = pair[0].generate(**batch, max_new_tokens=12, do_sample=False)
    assert torch.equal(found[1], plain)


def test_cache_continued_by_hand(pair: tuple[Any, Any]) -> None:
    ids = tokens(2, 9)
    with torch.no_grad():
        whole = pair[0](input_ids=ids).logits
        first = pair[1](input_ids=ids[:, :4], use_cache=True)
        second = pair[1](input_ids=ids[:, 4:6], past_key_values=first.past_key_values)
        third = pair[1](input_ids=ids[:, 6:7], past_key_values=second.past_key_values)
        rest = pair[1](input_ids=ids[:, 7:], past_key_values=third.past_key_values)
        got = torch.cat([first.logits, second.logits, third.logits, rest.logits], dim=1)
    assert error(got, whole) < LOGITS
    assert rest.past_key_values.get_seq_length() == 9


def test_the_cache_goes_by_the_name_that_transformers_gives_it(pair: tuple[Any, Any]) -> None:
    """It is `cache` from 5.24 on; 5.23 has an argument of that name for continuous batching alone."""
    renamed = "cache" in inspect.signature(GPT2LMHeadModel.forward).parameters
    ids = tokens(2, 6)
    with torch.no_grad():
        whole = pair[0](input_ids=ids).logits
        first = pair[1](input_ids=ids[:, :4], use_cache=True)
        if renamed:
            rest = pair[1](input_ids=ids[:, 4:], cache=first.cache).logits
            assert error(torch.cat([first.logits, rest], dim=1), whole) < LOGITS
        elif isinstance(pair[1].transformer.h[-1].attn, RemotePart | Departed):
            with pytest.raises(UnsupportedModelError, match=r"not understood.*got cache"):
                pair[1](input_ids=ids[:, 4:], cache=first.past_key_values)


def test_cache_cropped_selected_and_repeated_by_hand(pair: tuple[Any, Any]) -> None:
    ids = tokens(3, 8)
    found = []
    for model in pair:
        with torch.no_grad():
            cache = model(input_ids=ids, use_cache=True).past_key_values
            cache.crop(-3)
            cache.batch_select_indices(torch.tensor([2, 0]))
            cache.batch_repeat_interleave(2)
            cache.reorder_cache(torch.tensor([3, 0, 0, 1]))
            found.append(model(input_ids=tokens(4, 2, seed=3), past_key_values=cache).logits)
    assert error(found[1], found[0]) < LOGITS


@pytest.mark.parametrize(
    ("rows", "change"),
    [
        (2, lambda cache: cache.batch_select_indices(torch.tensor([0, 1]))),
        (1, lambda cache: cache.reorder_cache(torch.tensor([0]))),
        (8, lambda cache: cache.batch_repeat_interleave(2)),
        (6, lambda cache: cache.reorder_cache(torch.tensor([0, 1, 2, 3, 0, 1]))),
        (4, lambda cache: cache.crop(-5)),
    ],
    ids=["the first rows", "the first row", "each row twice", "more rows", "no token is left"],
)
def test_a_cache_whose_rows_are_fewer_or_more(pair: tuple[Any, Any], rows: int, change: Any) -> None:
    """The first rows are where they were, so nothing but their number tells; then back to some of them."""
    found = []
    for model in pair:
        with torch.no_grad():
            cache = model(input_ids=tokens(4, 5), use_cache=True).past_key_values
            change(cache)
            steps = [model(input_ids=tokens(rows, 1, seed=seed), past_key_values=cache).logits for seed in (1, 2)]
            cache.batch_select_indices(torch.tensor([0]))
            steps.append(model(input_ids=tokens(1, 2, seed=3), past_key_values=cache).logits)
            cache.crop(-3)  # to a token that was there when there were more rows
            steps.append(model(input_ids=tokens(1, 2, seed=4), past_key_values=cache).logits)
        found.append(torch.cat([step.flatten() for step in steps]))
    assert error(found[1], found[0]) < LOGITS


def test_two_caches_side_by_side(pair: tuple[Any, Any]) -> None:
    """Sessions of two conversations that take turns do not mix."""
    a, b = tokens(1, 6, seed=1), tokens(1, 6, seed=2)
    with torch.no_grad():
        caches = [pair[1](input_ids=ids[:, :4], use_cache=True).past_key_values for ids in (a, b)]
        for ids, cache in ((b, caches[1]), (a, caches[0])):
            got = pair[1](input_ids=ids[:, 4:], past_key_values=cache).logits
            assert error(got, pair[0](input_ids=ids).logits[:, 4:]) < LOGITS


def test_generation_from_embeddings(pair: tuple[Any, Any]) -> None:
    embeds = torch.randn(2, 3, 15, generator=torch.Generator().manual_seed(2)).double()
    mask = torch.ones(2, 3, dtype=torch.int64)
    arguments = {"inputs_embeds": embeds, "attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(pair[1].generate(**arguments), pair[0].generate(**arguments))


def test_hidden_states(pair: tuple[Any, Any]) -> None:
    ids = tokens(2, 3)
    with torch.no_grad():
        expected, got = (model.get_base_model().transformer(input_ids=ids).last_hidden_state for model in pair)
        assert error(got, expected) < LOGITS
        if any(isinstance(module, RemoteBody) for module in pair[1].modules()):
            for model in (pair[1], pair[1].get_base_model().transformer):
                for wanted in (True, 0):
                    with pytest.raises(UnsupportedModelError, match="output_hidden_states: the blocks' outputs stay"):
                        model(input_ids=ids, output_hidden_states=wanted)
            return
        expected, got = (model(input_ids=ids, output_hidden_states=True).hidden_states for model in pair)
    assert len(got) == len(expected) == 3
    assert max(error(g, e) for g, e in zip(got, expected, strict=True)) < LOGITS


def test_logits_of_the_last_position_only(pair: tuple[Any, Any]) -> None:
    ids = tokens(2, 5)
    with torch.no_grad():
        got = pair[1](input_ids=ids, logits_to_keep=1).logits
        assert got.shape[1] == 1
        assert error(got, pair[0](input_ids=ids).logits[:, -1:]) < LOGITS


# What cannot be exact is refused


def test_attention_weights_are_refused(balanced: tuple[Any, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="output_attentions"):
        balanced[1](input_ids=tokens(1, 3), output_attentions=True)


def test_static_cache_is_refused(balanced: tuple[Any, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="StaticCache"):
        balanced[1].generate(tokens(1, 3), max_new_tokens=2, cache_implementation="static", pad_token_id=END)


def test_copied_and_foreign_caches_are_refused(balanced: tuple[Any, Any]) -> None:
    ids = tokens(1, 3)
    with torch.no_grad():
        own = balanced[1](input_ids=ids, use_cache=True).past_key_values
        foreign = balanced[0](input_ids=ids, use_cache=True).past_key_values
        for cache in (copy.deepcopy(own), foreign):
            assert type(cache) is DynamicCache
            with pytest.raises(UnsupportedModelError, match="cache that this model did not fill"):
                balanced[1](input_ids=ids, past_key_values=cache)


def row_of_another_cache(mine: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.cat([mine[:1], other[1:]])


def tokens_of_another_row(mine: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return torch.cat([mine[:, :, :2], mine.flip(0)[:, :, 2:4], mine[:, :, 4:]], dim=2)


def tokens_in_another_order(mine: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return mine[:, :, [0, 2, 1, 3, 4]]


def one_token_of_another_cache(mine: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.cat([mine[:, :, :2], other[:, :, 2:3], mine[:, :, 3:]], dim=2)


@pytest.mark.parametrize(
    "join", [row_of_another_cache, tokens_of_another_row, tokens_in_another_order, one_token_of_another_cache]
)
def test_caches_put_together_by_hand_are_refused_or_as_in_the_plain_model(pair: tuple[Any, Any], join: Any) -> None:
    """Those of all layers alike; what is in the enclave is the plain model's."""
    found = []
    with torch.no_grad():
        for model in pair:
            one, two = (model(input_ids=tokens(2, 5, seed=s), use_cache=True).past_key_values for s in (1, 2))
            for mine, other in zip(one.layers, two.layers, strict=True):
                if mine.keys is None:  # `stream` has one layer for all
                    continue
                mine.keys, mine.values = join(mine.keys, other.keys), join(mine.values, other.values)
            if model is pair[1] and is_of_worker(one):
                with pytest.raises(UnsupportedModelError, match="put together of several"):
                    model(input_ids=tokens(2, 1, seed=3), past_key_values=one)
                return
            found.append(model(input_ids=tokens(2, 1, seed=3), past_key_values=one).logits)
    assert error(found[1], found[0]) < LOGITS


def is_of_worker(cache: DynamicCache) -> bool:
    """Whether a layer of it has places in the stead of keys."""
    return any(layer.keys is not None and layer.keys.shape[1] == 1 for layer in cache.layers)


def test_gradients_through_an_old_cache_are_refused(balanced: tuple[Any, Any]) -> None:
    ids = tokens(1, 3)
    cache = balanced[1](input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(UnsupportedModelError, match="gradients through a KV cache"):
        balanced[1](input_ids=ids, past_key_values=cache)


def test_additive_mask_is_refused(balanced: tuple[Any, Any]) -> None:
    bias = torch.full((1, 1, 3, 3), 0.5, dtype=torch.float64)
    with pytest.raises(UnsupportedModelError, match="additive attention bias"):
        balanced[1](input_ids=tokens(1, 3), attention_mask=bias)


def test_own_mask_of_allowed_and_forbidden(balanced: tuple[Any, Any]) -> None:
    """Two packed sequences that do not see each other: bool, and additive with the dtype's least value."""
    allowed = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).tril().bool()[None, None]
    additive = torch.zeros(1, 1, 5, 5, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)
    ids = tokens(1, 5)
    with torch.no_grad():
        expected = balanced[0](input_ids=ids, attention_mask=allowed).logits
        assert error(balanced[0](input_ids=ids).logits, expected) > 1e-3
        for mask in (allowed, additive):
            assert error(balanced[1](input_ids=ids, attention_mask=mask).logits, expected) < LOGITS
