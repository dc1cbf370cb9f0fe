"""The search finds a tensor however it is disguised within its promise, and nothing where there is nothing."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from obfuscatune.enclave.keys import MasterSecret, build

from .matching import AS_IT_IS, UP_TO_ORDER, search

GENERATOR = torch.Generator().manual_seed(0)
PLAIN = torch.randn(40, 32, generator=GENERATOR)
NOISE = [torch.randn(500, 32, generator=GENERATOR), torch.randn(32, 500, generator=GENERATOR)]
ORDER = torch.randperm(32, generator=GENERATOR)

DISGUISES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "itself": (lambda x: x, AS_IT_IS),
    "one row": (lambda x: x[7], AS_IT_IS),
    "scaled rows": (lambda x: x * torch.linspace(-5, 5, 40)[:, None], AS_IT_IS),
    "rows in another order": (lambda x: x.flip(0), AS_IT_IS),
    "transposed": (lambda x: x.T.contiguous(), AS_IT_IS),
    "rounded to bfloat16": (lambda x: x.bfloat16(), AS_IT_IS),
    "with more axes": (lambda x: x.view(2, 4, 5, 32), AS_IT_IS),
    "columns in another order": (lambda x: x[:, ORDER], UP_TO_ORDER),
    "columns in another order, other signs": (lambda x: x[:, ORDER] * (ORDER % 2 * 2 - 1), UP_TO_ORDER),
    "scaled columns": (lambda x: x * torch.linspace(1, 9, 32), UP_TO_ORDER),
    "one column": (lambda x: x[:, 3], UP_TO_ORDER),
}


@pytest.mark.parametrize("disguise", DISGUISES)
def test_is_found(disguise: str) -> None:
    change, how = DISGUISES[disguise]
    assert search({"plain": [PLAIN]}, [*NOISE, change(PLAIN)]) == {"plain": how}


@pytest.mark.parametrize("family", ["haar", "monarch", "conditioned", "gaussian"])
def test_is_not_found_under_a_key(family: str) -> None:
    key = build(family, MasterSecret.from_insecure_test_seed(1).stream("x"), 32, block=8, kappa=4.0)
    assert search({"plain": [PLAIN], "key": [key.dense()]}, [*NOISE, key.apply(PLAIN)]) == {}
    assert search({"key": [key.dense()]}, [*NOISE, key.dense().T]) == {"key": AS_IT_IS}


@pytest.mark.parametrize("dull", [torch.ones(40, 32), torch.eye(32), torch.zeros(3, 32), torch.randn(8, 8)])
def test_vectors_that_say_nothing_are_left_out(dull: Tensor) -> None:
    assert search({"plain": [dull]}, [dull]) == {}
