"""What is read of shares: of one worker, numbers that say nothing; of two, the private model and its rows."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from obfuscatune.protocol.residues import PRIMES
from obfuscatune.studies.audit.controls import LEAST_TOGETHER, share_together
from obfuscatune.studies.audit.lab import Recorded
from obfuscatune.studies.audit.shares import lift
from obfuscatune.studies.audit.view import STREAMS_OF

Recorder = Callable[[str], Recorded]
MODULUS = math.prod(PRIMES[:6])


@given(st.lists(st.integers(-(MODULUS // 2), MODULUS // 2), min_size=1, max_size=5))
def test_residues_give_the_integers_that_they_are_of(integers: list[int]) -> None:
    whole = torch.tensor(integers)
    planes = [whole.remainder(p) * pow(MODULUS // p, -1, p) for p in PRIMES[:6]]
    assert torch.equal(lift(planes, PRIMES[:6]), whole.double() / MODULUS)


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["shared", "shared+threshold=2"])
def test_a_coalition_has_all_and_one_worker_nothing(profile: str, recorded: Recorder) -> None:
    found = recorded(profile)
    assert share_together(found) >= LEAST_TOGETHER
    view, truth = found.sample.view, found.truth
    for block in range(view.blocks):
        for role, (stream, _) in STREAMS_OF.items():
            for seen, plain in (
                (view.weight(block, role), truth.private.weight(block, role)),
                (view.rows(block, stream), truth.streams[block, stream]),
            ):
                assert seen.shape == plain.shape
                assert seen.std().item() == pytest.approx(12**-0.5, rel=0.05)  # uniform from -.5 to .5
                correlation = torch.corrcoef(torch.stack([seen.flatten(), plain.flatten()]))[0, 1]
                assert correlation.abs() < 6 / math.sqrt(plain.numel())


@pytest.mark.slow
def test_passes_are_put_together_from_parts_of_calls(recorded: Recorder) -> None:
    found = recorded("shared")
    parts = 4 * found.sample.view.blocks
    assert [len(calls) for calls in found.sample.target.passes] == [parts]
    assert [len(calls) for calls in found.sample.training.passes][:2] == [parts, parts - 1]
    assert found.sample.view.rows(0, "attention in").shape == found.truth.streams[0, "attention in"].shape
