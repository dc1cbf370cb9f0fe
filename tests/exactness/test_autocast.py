"""Under ``torch.autocast`` a protected float32 model is as exact as the plain one, and no honest worker is accused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from .families import twins_of
from .models import gradients, scalar, tokens

# Of the error against the model without autocast, over that of the plain model under it. Measured at most .97, under
# strict, where PEFT's own layers round as they do in the plain model; elsewhere .52.
AGAINST_PLAIN = 1.2
WITHOUT = 1e-4  # float32; measured 3.5e-6


def run(model: Any, *, autocast: bool) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = model(input_ids=tokens(2, 8)).logits
    scalar(logits.float()).backward()
    return {"logits": logits.detach().float(), **gradients(model)}


def off(got: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Over all tensors together, each relative to its own size."""
    gaps = [((got[name] - exact[name]).norm() / exact[name].norm()).square() for name in got]
    return torch.stack(gaps).mean().sqrt().item()


def test_float32_products_are_whole_whatever_a_script_has_set(protect: Any) -> None:
    try:
        torch.set_float32_matmul_precision("medium")
        with pytest.warns(UserWarning, match='is "highest" again'):
            protected = protect(twins_of("gpt2", dtype=torch.float32)[1], profile="strict")
        with protected, torch.no_grad():
            assert torch.get_float32_matmul_precision() == "highest"
            torch.set_float32_matmul_precision("high")
            with pytest.warns(UserWarning, match='is "highest" again'):
                protected.model(input_ids=tokens(1, 4))
            assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("profile", ["plain", "paper", "balanced", "strict", "stream"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_autocast(protect: Any, family: str, profile: str) -> None:
    reference, model = twins_of(family, dtype=torch.float32)
    exact, plain = run(reference, autocast=False), run(reference, autocast=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        protected = protect(model, profile=profile)
    with protected:
        again = run(protected.model, autocast=False)
        got = run(protected.model, autocast=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):  # a backward in it too, which nobody should do
            run(protected.model, autocast=True)
    error_of_plain = off({name: plain[name] for name in got}, exact)
    assert error_of_plain > 1e-3  # the comparison sees autocast
    assert off(got, exact) < AGAINST_PLAIN * error_of_plain
    assert off(again, exact) < WITHOUT
