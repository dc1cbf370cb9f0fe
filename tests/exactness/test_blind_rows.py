"""Rows that attend to nothing, as at padding on the left: as in the plain model, or refused where a loss needs them."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from obfuscatune import NotFiniteError, UnsupportedModelError

from .families import model_of, twins_of, wide
from .models import error, gradients, scalar, tokens, worst

EXACT = 1e-9  # measured 1e-14
UNLIKE = 1e-2  # what a bias too many in such rows does; measured .2 and more
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6])
BIASED = ("gpt2", "gpt_neox", "qwen2", "llama, biases, tied")  # of v, by itself or of the norm before it

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def stock_code_is_wide() -> Iterator[None]:
    with wide():
        yield


def outputs(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logits = model(tokens(2, 6), attention_mask=LEFT).logits
    scalar(logits).backward()
    return logits.detach(), gradients(model)


@pytest.mark.parametrize("family", BIASED)
@pytest.mark.parametrize("profile", ["plain", "balanced"])
def test_all_rows_are_those_of_the_plain_model(protect: Any, family: str, profile: str) -> None:
    reference, model = twins_of(family)
    expected = outputs(reference)
    with protect(model, profile=profile) as protected:
        got = outputs(protected.model)
    assert error(got[0], expected[0]) < EXACT
    assert got[1]
    assert worst(got[1], {name: expected[1][name] for name in got[1]}) < EXACT


def test_these_rows_are_unlike_those_with_the_bias(protect: Any) -> None:
    """What the tests above would see if it were left in."""
    model = model_of("gpt2")
    with protect(model, profile="balanced") as protected, torch.no_grad():
        got = protected.model(tokens(2, 6), attention_mask=LEFT).logits
        for module in protected.model.modules():
            if hasattr(module, "_own_bias"):
                module._own_bias = module.bias
        assert error(protected.model(tokens(2, 6), attention_mask=LEFT).logits, got) > UNLIKE


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_eager_attention_looks_at_all_positions_alike(protect: Any, family: str) -> None:
    models = []
    for _ in range(2):
        model = model_of(family)
        model.get_base_model().set_attn_implementation("eager")
        models.append(model)
    expected = outputs(models[0])
    with protect(models[1], profile="balanced") as protected:
        got = outputs(protected.model)
    assert error(got[0], expected[0]) < EXACT
    assert worst(got[1], {name: expected[1][name] for name in got[1]}) < EXACT


@pytest.mark.parametrize("way", [("eager", "sdpa"), ("sdpa", "eager"), ("eager", "sdpa", "eager")], ids="-".join)
@pytest.mark.parametrize("of_body", [False, True])
def test_the_kind_of_attention_is_set_after_protect(protect: Any, way: tuple[str, ...], *, of_body: bool) -> None:
    reference, model = twins_of("llama")
    for each in (reference, model):
        each.get_base_model().set_attn_implementation(way[0])
    before = outputs(reference)[0]
    with protect(model, profile="balanced") as protected:
        for kind in way[1:]:
            for each in (reference, protected.model):
                inner = each.get_base_model()
                (inner.model if of_body else inner).set_attn_implementation(kind)
            reference.zero_grad()
            protected.model.zero_grad()
            got, expected = outputs(protected.model), outputs(reference)
            assert error(got[0], expected[0]) < EXACT
            assert worst(got[1], {name: expected[1][name] for name in got[1]}) < EXACT
    assert (error(before, expected[0]) > UNLIKE) == (way[0] != way[-1])


def test_masks_of_bools_once_attention_is_eager_are_refused(protect: Any) -> None:
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    with protect(model_of("llama"), profile="balanced") as protected, torch.no_grad():
        protected.model(tokens(2, 6), attention_mask=mask)
        protected.model.get_base_model().set_attn_implementation("eager")
        with pytest.raises(UnsupportedModelError, match="a mask of bools for eager attention"):
            protected.model(tokens(2, 6), attention_mask=mask)
        protected.model.get_base_model().set_attn_implementation("sdpa")
        protected.model(tokens(2, 6), attention_mask=mask)


def test_a_mask_of_least_numbers_looks_at_all_positions_alike(protect: Any) -> None:
    reference, model = twins_of("gpt2")
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    mask[:, :, 2] = False
    least = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    with protect(model, profile="balanced") as protected, torch.no_grad():
        for each in (mask, least):
            got, expected = (m(tokens(2, 6), attention_mask=each).logits for m in (protected.model, reference))
            assert error(got, expected) < EXACT


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_a_loss_that_needs_them_is_refused_where_all_blocks_are_on_the_worker(protect: Any, family: str) -> None:
    reference, model = twins_of(family)
    labels = tokens(2, 6).masked_fill(LEFT == 0, -100)
    good = labels.clone()
    good[0, 3] = -100  # predicted from padding
    with protect(model, profile="stream") as protected:
        for wanted in (torch.no_grad(), torch.enable_grad()):
            with wanted, pytest.raises(UnsupportedModelError, match="positions that attend to nothing"):
                protected.model(tokens(2, 6), attention_mask=LEFT, labels=labels)
        logits = protected.model(tokens(2, 6), attention_mask=LEFT).logits
        with pytest.raises(UnsupportedModelError, match="positions that attend to nothing"):
            scalar(logits).backward()
        for each in (reference, protected.model):
            each.zero_grad()
            seen = each(tokens(2, 6), attention_mask=LEFT, labels=good).logits[good != -100]
            seen.square().sum().backward()
        got, expected = gradients(protected.model), gradients(reference)
        assert worst(got, {name: expected[name] for name in got}) < EXACT


def test_a_row_that_others_attend_to_is_refused_there(protect: Any) -> None:
    reference, model = twins_of("gpt2")
    past = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril(-1)  # the first position sees nothing, and all see it
    with protect(model, profile="stream") as protected, torch.no_grad():
        with pytest.raises(UnsupportedModelError, match="that others attend to"):
            protected.model(tokens(2, 6), attention_mask=past)
        protected.model(tokens(2, 6))
    reference, model = twins_of("gpt2")
    with protect(model, profile="balanced") as protected, torch.no_grad():
        got, expected = (m(tokens(2, 6), attention_mask=past).logits for m in (protected.model, reference))
    assert error(got, expected) < EXACT


def test_a_run_that_diverged_is_told_as_that(protect: Any) -> None:
    with protect(model_of("gpt2"), profile="stream") as protected:
        logits = protected.model(tokens(2, 6), attention_mask=LEFT).logits
        with pytest.raises(NotFiniteError):
            (logits[1] * float("nan")).sum().backward()  # of the row without padding


def test_eager_blocks_in_the_enclave_do_as_those_on_the_worker(protect: Any) -> None:
    models = [model_of("llama") for _ in range(2)]
    for model in models:
        model.get_base_model().set_attn_implementation("eager")
    with protect(models[1], profile="balanced", enclave_blocks=1) as protected, torch.no_grad():
        got, expected = (m(tokens(2, 6), attention_mask=LEFT).logits for m in (protected.model, models[0]))
    assert error(got, expected) < EXACT


def test_models_without_a_bias_of_v_need_no_refusal(protect: Any) -> None:
    reference, model = twins_of("llama")
    expected = outputs(reference)
    with protect(model, profile="stream") as protected:
        got = outputs(protected.model)
    assert error(got[0], expected[0]) < EXACT
    assert worst(got[1], {name: expected[1][name] for name in got[1]}) < EXACT


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_rows_that_allow_nothing_in_several_ways_are_refused(protect: Any, family: str) -> None:
    """Of one number all weights are equal; -inf gives 0, or NaN in eager attention; of several the largest is seen."""
    reference, model = twins_of(family)
    least, infinite = torch.finfo(torch.float64).min, float("-inf")
    ids, future = tokens(2, 6), torch.ones(6, 6).bool().triu(1)

    def mask(elsewhere: float, first: list[float]) -> torch.Tensor:
        found = torch.zeros(2, 1, 6, 6, dtype=torch.float64).masked_fill(future, elsewhere)
        found[0, 0, :2] = torch.tensor(first, dtype=torch.float64)
        return found

    of_one = [mask(least, 6 * [least]), mask(infinite, 6 * [least])]
    of_several = [mask(least, 3 * [least / 1.5] + 3 * [infinite]), mask(least, 3 * [least / 1.5] + 3 * [least])]
    (of_several if family == "gemma2" else of_one).append(mask(infinite, 6 * [infinite]))
    with protect(model, profile="balanced") as protected:
        for each in of_one:
            found, expected = (one(input_ids=ids, attention_mask=each).logits for one in (protected.model, reference))
            assert error(found, expected) < EXACT
        for each in of_several:
            with pytest.raises(UnsupportedModelError, match="a mask whose rows that allow nothing"):
                protected.model(input_ids=ids, attention_mask=each)
        with pytest.raises(UnsupportedModelError, match="gradients of an attention mask"):
            protected.model(input_ids=ids, attention_mask=of_one[0].requires_grad_())
