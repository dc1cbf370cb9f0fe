"""Profile `shared`: every family, training and generation, at the precision that the primes give."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import obfuscatune
from obfuscatune.studies.bundled import BUNDLED_FAMILIES, model_directory

from .conftest import listening
from .families import RECORDED, UNRECORDED, twins_of, wide
from .models import error, gradients, scalar, tokens, twins, worst
from .test_bfloat16 import AGAINST_PLAIN, off
from .test_families import compare, padded
from .test_training import adapter, by_trainer, curve

# Relative to the largest entry, of logits and of gradients, in random models whose layers amplify errors. A product is
# off by sqrt(width) / 2^23 / 2.5 at 6 primes, a tenth of that at 7 (where float32 takes over), 200 times that at 4.
# Measured, the worst of all families, logits and gradients: 7 primes 9.2e-7 and 9.8e-6, 6 primes 5.5e-6 and 4.1e-5,
# 4 primes 7.0e-4 and 9.9e-3.
EXACT = {7: 2e-5, 6: 1e-4, 4: 4e-2}
# Of logits of trained models, against float64. Measured: gpt2 and llama 4e-7 and 6e-7 where plain float32 has 3e-7.
TRAINED = {6: 2e-6, 4: 3e-4}
AFTER_TRAINING = 1e-4  # relative to the largest entry, after 30 steps of AdamW

pytestmark = pytest.mark.filterwarnings("ignore:.*protect nothing:UserWarning")
Share = Callable[..., Any]


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Addresses of as many workers as any test here needs."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(listening(tmp_path_factory.mktemp("w"))) for _ in range(5)]


@pytest.fixture
def share(workers: list[str]) -> Share:
    """`obfuscatune.protect` under `shared` with the first so many workers."""

    def protect(model: Any, count: int = 3, **switches: Any) -> Any:
        return obfuscatune.protect(model, profile="shared", worker=workers[:count], timeout=60.0, **switches)

    return protect


QUICK = ("gpt2", "llama", "gemma2", "gpt_neox", "olmo2")


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[] if f in QUICK else [pytest.mark.slow]) for f in (*RECORDED, *UNRECORDED)],
)
def test_every_family(share: Share, family: str) -> None:
    for primes, exact in EXACT.items():
        reference, model = twins_of(family)
        with wide(), share(model, primes=primes) as protected:
            logits, grads = compare(reference, protected, *padded())
        assert logits < exact and grads < exact
        assert max(logits, grads) > exact / 1000  # the bound is not an empty one


@pytest.mark.parametrize(
    ("count", "switches"),
    [(2, {"weights": "open"}), (5, {"threshold": 2}), (4, {"spares": 1}), (3, {"verify": False})],
    ids=["open weights", "two may collude", "a spare", "not verified"],
)
def test_other_schemes(share: Share, count: int, switches: dict[str, Any]) -> None:
    reference, model = twins(dtype=torch.float32)
    with share(model, count, **switches) as protected:
        logits, grads = compare(reference, protected, *padded())
    assert logits < EXACT[6] and grads < EXACT[6]


@pytest.mark.parametrize("family", BUNDLED_FAMILIES)
def test_logits_of_trained_models(share: Share, family: str) -> None:
    plain = AutoModelForCausalLM.from_pretrained(model_directory(family)).eval()
    exact = copy.deepcopy(plain).double()
    ids = torch.randint(1, 2000, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = exact(input_ids=ids).logits
        float32 = ((plain(input_ids=ids).logits - expected).norm() / expected.norm()).item()
        for primes, bound in TRAINED.items():
            with share(copy.deepcopy(plain), primes=primes) as protected:
                found = ((protected.model(input_ids=ids).logits - expected).norm() / expected.norm()).item()
            assert float32 < found < bound
    with share(plain) as protected:
        assert protected.profile.primes == next(iter(TRAINED))  # the default


@pytest.mark.parametrize("family", BUNDLED_FAMILIES)
def test_bfloat16_models_with_three_primes(share: Share, family: str) -> None:
    exact = AutoModelForCausalLM.from_pretrained(model_directory(family), dtype=torch.float64).eval()
    plain = copy.deepcopy(exact).to(torch.bfloat16)
    ids = torch.randint(1, 2000, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = exact(input_ids=ids).logits
        error_of_plain = off(plain(input_ids=ids).logits, expected)
        with share(plain) as protected:
            assert protected.profile.primes == 3
            assert off(protected.model(input_ids=ids).logits, expected) < AGAINST_PLAIN * error_of_plain


@pytest.mark.parametrize("family", BUNDLED_FAMILIES)
@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_tokens_are_equal(share: Share, family: str, batch: int) -> None:
    plain = AutoModelForCausalLM.from_pretrained(model_directory(family)).eval()
    ids = torch.randint(1, 2000, (batch, 9), generator=torch.Generator().manual_seed(0))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    expected = plain.generate(ids, **options)
    beams = plain.generate(ids, **options, num_beams=3)
    with share(plain) as protected:
        assert torch.equal(protected.model.generate(ids, **options), expected)
        assert torch.equal(protected.model.generate(ids, **options, num_beams=3), beams)


def test_thirty_steps_of_adamw(share: Share, tmp_path: Path) -> None:
    reference, model = twins(dtype=torch.float32)
    untrained = adapter(reference)
    expected = by_trainer(reference, tmp_path)
    with share(model) as protected:
        got = by_trainer(protected.model, tmp_path)
        assert error(curve(got), curve(expected)) < AFTER_TRAINING
        assert worst(adapter(protected.model), adapter(reference)) < AFTER_TRAINING
    assert worst(untrained, adapter(reference)) > 0.1  # the control: it has been trained


def test_results_are_the_same_bits_in_every_session_and_batch(share: Share) -> None:
    """Masks differ from session to session, and leave no trace; a row does not know what it is multiplied beside."""
    found = []
    for _ in range(2):
        _, model = twins(dtype=torch.float32)
        with share(model, 4, spares=1) as protected, torch.no_grad():
            weight = next(m for m in protected.model.modules() if hasattr(m, "group"))
            x = torch.randn(700, weight.group.placed.key_in.size, generator=torch.Generator().manual_seed(1))
            found.append(weight(x))
            found.append(torch.cat([weight(part.clone()) for part in x.split([1, 99, 600])]))
    assert all(torch.equal(y, found[0]) for y in found)


def test_autocast(share: Share) -> None:
    reference, model = twins(dtype=torch.float32)
    ids, mask = padded()
    with share(model) as protected, torch.autocast("cpu", dtype=torch.bfloat16):
        logits = protected.model(input_ids=ids, attention_mask=mask).logits
        scalar(logits.float()).backward()
        assert gradients(protected.model)
        assert error(logits.float(), reference(input_ids=ids, attention_mask=mask).logits.float()) < 0.1


def test_what_is_not_finite_stays_so(share: Share) -> None:
    _, model = twins(dtype=torch.float32)
    model.get_input_embeddings().weight.data[3] = torch.inf
    with share(model) as protected, torch.no_grad():
        assert protected.model(input_ids=torch.tensor([[3, 4]])).logits.isnan().all()
        logits = protected.model(input_ids=tokens(1, 4).clamp(min=4)).logits  # the head is tied to the embeddings
        assert logits[..., 4:].isfinite().all()


def test_the_report_says_what_is_claimed_and_what_is_not(share: Share, workers: list[str]) -> None:
    _, model = twins(dtype=torch.float32)
    with share(model) as protected:
        protected.model(input_ids=tokens(1, 4))
    text, plain = str(protected.report()), protected.report().to_dict()
    for part in (
        "Each operator alone sees uniformly random numbers",
        "Any two together can recover",
        "leaks are not",
        "6 primes",
    ):
        assert part in text
    assert "protect nothing" in text and "s of products" in text
    assert plain["sharing"]["threshold"] == 1 and len(plain["sharing"]["busy"]) == 3
    assert plain["enclave_parameters"] + plain["worker_parameters"] == plain["total_parameters"]
    _, model = twins()
    with pytest.warns(UserWarning, match="3 workers on one machine protect nothing"):
        share(model).close()
    with share(twins()[1], 5, threshold=2) as protected:
        assert "Any 2 operators together see" in str(protected.report())
    with share(twins()[1], 2, weights="open") as protected:
        assert "in the clear on every worker" in str(protected.report())


def test_numbers_of_workers_that_do_not_fit(workers: list[str]) -> None:
    protect = partial(obfuscatune.protect, profile="shared")
    for worker in (workers[:2], workers[:4], workers[0], [workers[0], workers[0], workers[1]]):
        with pytest.raises(obfuscatune.UsageError, match=r"number of workers|given twice"):
            protect(twins()[1], worker=worker)


def test_workers_of_our_own(tmp_path: Path) -> None:
    reference, model = twins(dtype=torch.float32)
    with obfuscatune.protect(model, profile="shared", threads=1) as protected:
        assert len(protected.links) == 3
        logits, grads = compare(reference, protected, *padded())
    assert logits < EXACT[6] and grads < EXACT[6]
