"""What each worker of `shared` gets to know in two training steps and a generation, and what two of them together do.

Three workers that record everything. In any one link nothing plain is found, and all numbers are uniform; the same
search finds weights and activations in what two links give together, which is its control.
"""

import contextlib
import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import obfuscatune
from obfuscatune.protocol.residues import PRIMES

from .matching import AS_IT_IS, UP_TO_ORDER, search
from .models import new_model
from .recording import Recording, _work, recording_worker
from .truth import tell_activations, tell_weights

COUNT = 6
# What two links give: the inputs of all layers, up to the scale of each row, and weights, up to that of each column, so
# that their columns are found. Of gradients the columns' scales are divided out, which the search does not see through.
POOLED = {
    "attention in weight": UP_TO_ORDER,
    "attention out weight": UP_TO_ORDER,
    "MLP in weight": UP_TO_ORDER,
    "MLP out weight": UP_TO_ORDER,
    "MLP activations": AS_IT_IS,
    "heads' output": AS_IT_IS,
    "output of the norm before attention": AS_IT_IS,
    "output of the norm before MLP": AS_IT_IS,
}


@pytest.fixture(scope="module", params=["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Recording]]:
    """The recordings of three workers; the truth is in the first."""
    recordings = [Recording() for _ in range(3)]
    model = new_model(request.param)
    twin = copy.deepcopy(model)
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        # These three are threads of one process, which would refuse a second point.
        patch.setattr("obfuscatune.worker.residues.refuse_second_point", lambda sharing, point: None)
        addresses = []
        for i, recording in enumerate(recordings):
            directory: Path = tmp_path_factory.mktemp(f"wire{i}")
            addresses.append(stack.enter_context(recording_worker(directory / "w", recording)))
        with pytest.warns(UserWarning, match="protect nothing"):
            protected = obfuscatune.protect(model, profile="shared", worker=addresses, timeout=60)
        with protected:
            _work(protected.model, protected.create_optimizer("sgd", lr=0.1))
    truth = recordings[0].truth
    tell_weights(truth, twin)
    tell_activations(truth, twin)
    _work(twin, torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.1))
    tell_weights(truth, twin)
    yield recordings


def shares(recording: Recording) -> list[tuple[Any, Tensor]]:
    """All shares that a worker was sent, in order, with what they are for."""
    found = []
    for fields, tensors in recording.frames("to worker"):
        for tensor in tensors.values():
            assert tensor.dtype == torch.int8 and tensor.shape[0] == COUNT
            found.append(((fields["op"], fields["segment"], fields.get("transpose")), tensor))
    return found


def lifted(residues: Tensor, *, of_weight: bool = False) -> Tensor:
    """The integers of residues ``[L, ..]``, in float64; those of a weight were multiplied by (M / p)^-1 beforehand."""
    primes = PRIMES[:COUNT]
    modulus = math.prod(primes)
    total = torch.zeros(residues.shape[1:], dtype=torch.int64)
    for plane, p in zip(residues, primes, strict=True):
        rest = modulus // p
        factor = 1 if of_weight else pow(rest, -1, p)
        total = (total + (plane * factor).remainder(p) * rest) % modulus
    return torch.where(total > modulus // 2, total - modulus, total).double()


def pooled(first: Recording, second: Recording) -> list[Tensor]:
    """What two workers have together: 2 X(1) - X(2), lifted."""
    together = []
    for (what, a), (same, b) in zip(shares(first), shares(second), strict=True):
        assert what == same
        together.append(lifted(2 * a.long() - b.long(), of_weight=what[0] == "define"))
    return together


def test_in_one_link_nothing_is_found(recorded: list[Recording]) -> None:
    for recording in recorded:
        seen = [rows for _, tensor in shares(recording) for rows in (tensor[0].float(), lifted(tensor.long()))]
        assert search(recorded[0].truth, seen) == {}


def test_in_two_links_everything_is_found(recorded: list[Recording]) -> None:
    found = search(recorded[0].truth, pooled(*recorded[:2]))
    assert {name: found.get(name) for name in POOLED} == POOLED


def test_all_numbers_of_a_link_are_uniform(recorded: list[Recording]) -> None:
    for recording in recorded:
        for i, p in enumerate(PRIMES[:COUNT]):
            numbers = torch.cat([tensor[i].flatten() for _, tensor in shares(recording)]).long() + p // 2
            counts = torch.bincount(numbers, minlength=p).double()
            assert len(counts) == p
            expected = len(numbers) / p
            assert expected > 100
            chi_square = ((counts - expected) ** 2 / expected).sum().item()
            assert abs(chi_square - (p - 1)) < 6 * (2 * (p - 1)) ** 0.5


def test_the_control_two_links_are_not_uniform(recorded: list[Recording]) -> None:
    (_, a), (_, b) = shares(recorded[0])[0], shares(recorded[1])[0]
    integers = lifted(2 * a.long() - b.long(), of_weight=True)
    assert integers.abs().max() < 2**30 and lifted(a.long(), of_weight=True).abs().max() > 2**40


def test_headers_tell_the_form_and_nothing_else(recorded: list[Recording]) -> None:
    allowed = {
        "hello": set(),
        "stats": set(),
        "define": {"segment", "kind", "spec"},
        "multiply": {"segment", "transpose"},
    }
    for recording in recorded:
        for fields, _ in recording.frames("to worker"):
            seeded = {"drawn"} if recording is recorded[0] and allowed[fields["op"]] else set()
            assert set(fields) - {"id", "op"} == allowed[fields["op"]] | seeded
            if fields["op"] == "define":
                assert set(fields["spec"]) == {"primes", "point", "sharing"}
        assert b"private" not in recording.raw["to worker"]


def test_of_the_first_share_seeds_cross_alone(recorded: list[Recording]) -> None:
    first, second, third = (len(recording.raw["to worker"]) for recording in recorded)
    assert second == third and first < 0.1 * second
