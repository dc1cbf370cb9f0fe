"""What is read from a recording is what the private model computed, under the true keys; and nothing else helps."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch

from obfuscatune.studies.audit.controls import known_key
from obfuscatune.studies.audit.fixtures import Fixtures
from obfuscatune.studies.audit.lab import RANK, TARGET_ROWS, TRAINING_STEPS, Recorded, record
from obfuscatune.studies.audit.view import ROLES, STREAMS_OF

Recorder = Callable[[str], Recorded]
STATIC = [
    *("paper", "balanced", "stream"),
    pytest.param("balanced+attention=enclave+mlp=enclave", marks=pytest.mark.slow),  # linear layers, as of `paper`
]


@pytest.fixture(scope="module")
def recorded(untaught: Fixtures) -> Recorder:
    """A session under a profile, by the profile's name. What a model has learned makes no difference to its reading."""
    return cache(lambda profile: record(untaught, profile, 0, (16, 64, 256)))


@pytest.mark.parametrize("profile", [*STATIC, "strict"])
def test_true_keys_give_the_private_models_rows_and_weights(profile: str, recorded: Recorder) -> None:
    assert known_key(recorded(profile)) > 0.999


@pytest.mark.parametrize("profile", ["paper", "balanced", "stream"])
def test_other_keys_do_not(profile: str, recorded: Recorder) -> None:
    found = recorded(profile)
    keys = {place: key.flip(0) for place, key in found.truth.keys.items()}
    swapped = replace(found, truth=replace(found.truth, keys=keys))
    assert known_key(swapped) < 0.5


def test_what_paper_leaves_in_the_clear_is_read_as_it_is(recorded: Recorder) -> None:
    found = recorded("paper")
    for stream in ("qkv", "heads", "hidden", "activations"):
        for block in range(found.sample.view.blocks):
            rows, truth = found.sample.view.rows(block, stream), found.truth.streams[block, stream]
            if stream in ("qkv", "hidden"):
                assert torch.allclose(rows, truth, atol=1e-4), stream


def test_a_body_is_read_part_by_part(recorded: Recorder) -> None:
    """`stream`: what its parts leave adds up to what the worker answered, and gradients of a step come in reverse."""
    view = recorded("stream").sample.training
    forward, backward = view.passes[:2]
    assert [call.segment.roles[0] for call in forward] == ["qkv", "up", "qkv", "up"]
    assert [call.segment.block for call in backward] == [1, 1, 0, 0]
    for block in range(view.blocks):
        assert view.rows(block, "gradient of attention in").shape == view.rows(block, "attention in").shape


def test_what_the_worker_computes_inside_gives_what_it_answered(recorded: Recorder) -> None:
    """`balanced`: heads and activations, recomputed, times the output weights are the recorded replies."""
    view = recorded("balanced").sample.view
    for block in range(view.blocks):
        for stream, role, out in (("heads", "out", "attention out"), ("activations", "down", "mlp out")):
            product = view.rows(block, stream) @ view.weight(block, role)
            assert torch.allclose(product, view.rows(block, out), atol=1e-4)


@pytest.mark.parametrize("profile", [*STATIC, "strict"])
def test_passes_rows_and_shapes(profile: str, recorded: Recorder) -> None:
    found = recorded(profile)
    view, truth = found.sample.view, found.truth
    assert view.blocks == 2
    assert view.mixed == (profile == "strict")
    for block in range(view.blocks):
        for role in ROLES:
            assert view.weight(block, role).shape == truth.private.weight(block, role).shape
            into, out = STREAMS_OF[role]
            if not view.mixed:
                assert view.rows(block, into).shape == truth.streams[block, into].shape
                assert view.rows(block, out).shape == truth.streams[block, out].shape
            else:
                assert view.rows(block, into).shape[1] == truth.streams[block, into].shape[1]
    if not view.mixed:
        assert len(found.sample.target.rows(0, "attention in")) == TARGET_ROWS * 32
    assert len(truth.target_tokens) == TARGET_ROWS * 32


@pytest.mark.parametrize("profile", [*STATIC, "strict"])
def test_a_training_session_is_read_as_steps_forward_and_backward(profile: str, recorded: Recorder) -> None:
    found = recorded(profile)
    passes = found.sample.training.passes
    assert [calls[0].backward for calls in passes] == [False, True] * TRAINING_STEPS
    assert found.truth.training.rank == RANK
    gradient = found.sample.training.rows(1, "gradient of mlp out")
    if not found.sample.training.mixed:
        silent = gradient.abs().sum(dim=1) < 1e-12
        assert silent.any()
        assert not silent.all()


def test_a_smaller_budget_is_a_beginning_of_the_session(recorded: Recorder) -> None:
    found = recorded("paper")
    sample, truth = found.cut(64)
    assert len(truth.tokens) == 64
    assert torch.equal(sample.view.rows(0, "attention in"), found.sample.view.rows(0, "attention in")[:64])
    assert torch.equal(truth.streams[1, "mlp in"], found.truth.streams[1, "mlp in"][:64])


def test_times_and_sizes_are_there(recorded: Recorder) -> None:
    calls = [call for calls in recorded("balanced").sample.view.passes for call in calls]
    assert len(calls) > 8
    assert all(call.ended > call.started >= 0 for call in calls)
    assert all(call.sent > call.inputs["x"].nbytes for call in calls)
    assert all(call.received > call.outputs["y"].nbytes for call in calls)
