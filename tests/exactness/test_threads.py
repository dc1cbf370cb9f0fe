"""One protected model in several threads at once: each gets what the plain model gives."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from obfuscatune.enclave.remote.norms import FoldedNorm

from .models import error, scalar, tokens, twins

BOUND = 1e-9
THREADS = 4


@pytest.mark.parametrize("profile", ["plain", "paper", "balanced", "strict", "stream"])
def test_forward_generation_and_gradients(profile: str, protect: Callable[..., Any]) -> None:
    reference, model = twins(n_layer=2)
    failures: list[str] = []

    def gradients(of: Any, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        trained = [p for p in of.parameters() if p.requires_grad]
        return torch.autograd.grad(scalar(of(ids).logits), trained)

    def work(number: int, expected: dict[str, Any]) -> None:
        ids = tokens(1 + number % 2, 5 + number, seed=number)
        for _ in range(3):
            with torch.no_grad():
                if error(protected.model(ids).logits, expected["logits"]) > BOUND:
                    failures.append("logits")
                if not torch.equal(protected.model.generate(ids, max_new_tokens=4, do_sample=False), expected["ids"]):
                    failures.append("tokens")
            if profile != "paper":  # there two gradients would add up on the worker
                found = gradients(protected.model, ids)
                if max(map(error, found, expected["gradients"])) > BOUND:
                    failures.append("gradients")

    def expect(number: int) -> dict[str, Any]:
        ids = tokens(1 + number % 2, 5 + number, seed=number)
        found = {"gradients": gradients(reference, ids)}
        with torch.no_grad():
            return {
                **found,
                "logits": reference(ids).logits,
                "ids": reference.generate(ids, max_new_tokens=4, do_sample=False),
            }

    expected = [expect(number) for number in range(THREADS)]
    with protect(model, profile=profile) as protected:
        threads = [threading.Thread(target=work, args=(number, expected[number])) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_a_norm_hands_each_thread_its_own_rows(protect: Callable[..., Any]) -> None:
    """Both threads are made to pass the first norm before either goes on: what one gets is not the other's."""
    reference, model = twins(n_layer=1)
    with protect(model, profile="balanced") as protected, torch.no_grad():
        both = threading.Barrier(2, timeout=60)
        norm = next(module for module in protected.model.modules() if isinstance(module, FoldedNorm))

        def wait(*_: Any) -> None:
            both.wait()

        norm.register_forward_hook(wait)
        errors: list[float] = []

        def work(number: int) -> None:
            ids = tokens(1, 6, seed=number)
            with torch.no_grad():
                errors.append(error(protected.model(ids).logits, reference(ids).logits))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(errors) == 2
    assert max(errors) < BOUND
