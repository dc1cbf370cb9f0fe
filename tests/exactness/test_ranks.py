"""What DistributedDataParallel copies from the first rank to all is the same in each, whatever its secret."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from obfuscatune import UnsupportedModelError

from .conftest import listening
from .families import twins_of, wide
from .models import error, tokens

EXACT = 1e-9
SHARES = 1e-3  # of `shared`, whose products are off by rounding
FAMILIES = ["gpt2", "gpt_neox", "qwen2"]  # with a bias of v, with norms with a bias, or both
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("plain", {}),
    "paper": ("paper", {}),
    "balanced": ("balanced", {}),
    "balanced, first block inside": ("balanced", {"enclave_blocks": 1}),
    "balanced, parts inside": ("balanced", {"attention": "enclave", "mlp": "enclave"}),
    "balanced, lora worker": ("balanced", {"lora_placement": "worker", "fold_norms": False}),
    "strict": ("strict", {}),
    "strict, norms folded": ("strict", {"fold_norms": True}),
    "stream": ("stream", {}),
    "shared": ("shared", {}),
}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def three(
    worker: str, second_worker: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], list[str]]]:
    """Addresses of three workers, of which the last is started when one asks."""
    with contextlib.ExitStack() as stack:
        found: list[str] = []

        def addresses() -> list[str]:
            found[:] = found or [stack.enter_context(listening(tmp_path_factory.mktemp("worker")))]
            return [worker, second_worker, *found]

        yield addresses


def copied(model: Any) -> dict[str, Tensor]:
    """What DistributedDataParallel takes of a model: its parameters when it is made, its buffers before each call."""
    return {name: t.detach() for name, t in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_ranks_copy_does_not_depend_on_their_secrets(
    protect: Callable[..., Any], three: Callable[[], list[str]], variant: str, family: str
) -> None:
    profile, switches = VARIANTS[variant]
    if profile == "shared":
        switches = {"worker": three()}
    reference, model = twins_of(family)
    with wide():
        with protect(copy.deepcopy(model), profile=profile, insecure_test_seed=1, **switches) as first:
            given = {name: tensor.clone() for name, tensor in copied(first.model).items()}
        with protect(model, profile=profile, insecure_test_seed=2, **switches) as second:
            own = copied(second.model)
            assert list(own) == list(given)
            unlike = [name for name, tensor in own.items() if not torch.equal(tensor, given[name])]
            with torch.no_grad():
                for name, tensor in own.items():  # as that rank would get them
                    tensor.copy_(given[name])
                got, expected = (each(tokens(2, 6)).logits for each in (second.model, reference))
        assert error(got, expected) < (SHARES if profile == "shared" else EXACT)
        assert not unlike


@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_a_bias_of_what_left_is_watched_all_the_same(protect: Callable[..., Any], part: str) -> None:
    reference, model = twins_of("gpt2")
    with protect(model, profile="balanced") as protected, torch.no_grad():
        module: Any = protected.model.get_base_model().transformer.h[0].get_submodule(part)
        before = module.bias.clone()
        for change, back in (
            (lambda: module.bias.add_(1), lambda: module.bias.copy_(before)),
            (lambda: setattr(module, "bias", before + 1), lambda: setattr(module, "bias", before)),
            (lambda: setattr(module, "bias", None), lambda: setattr(module, "bias", before)),
        ):
            change()
            with pytest.raises(UnsupportedModelError, match=r"norm or bias.*it was changed.*h\.0\.(attn|mlp)\.bias"):
                protected.model(tokens(2, 6))
            back()
            assert error(protected.model(tokens(2, 6)).logits, reference(tokens(2, 6)).logits) < EXACT
        assert not any(name.endswith(f"{part}.bias") for name in protected.model.state_dict())
