"""What is read from a recording is what the private model computed, under the true keys; and nothing else helps."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache

import pytest
import torch

from obfuscatune.studies.audit.attacks import linking
from obfuscatune.studies.audit.attacks.theft import assemble
from obfuscatune.studies.audit.body import BodyReader
from obfuscatune.studies.audit.controls import known_key
from obfuscatune.studies.audit.fixtures import Fixtures
from obfuscatune.studies.audit.lab import RANK, TARGET_ROWS, TRAINING_STEPS, Recorded, record
from obfuscatune.studies.audit.view import ROLES, STREAMS_OF, Call

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


@pytest.fixture(scope="module")
def biased(untaught: Fixtures) -> tuple[Recorded, list[tuple[Call, list[Call]]]]:
    """A session under `stream` of a GPT-2 whose biases are as large as what they are added to; what was read of it.

    Few steps of training leave biases near zero, where they hide nothing.
    """
    private, generator = deepcopy(untaught.private), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in private.transformer.h:
            for layer in (block.attn.c_proj, block.mlp.c_proj):
                layer.bias.add_(0.3 * torch.randn(layer.bias.shape, generator=generator))
    bodies: list[tuple[Call, list[Call]]] = []
    read = BodyReader.read

    def kept(self: BodyReader, call: Call) -> list[Call]:
        bodies.append((call, read(self, call)))
        return bodies[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BodyReader, "read", kept)
        return record(replace(untaught, private=private), "stream", 0, (16, 64)), bodies


def test_what_parts_leave_adds_up_to_what_the_body_answered(
    biased: tuple[Recorded, list[tuple[Call, list[Call]]]],
) -> None:
    found, bodies = biased
    forward = [(call, parts) for call, parts in bodies if not call.backward]
    assert len(forward) > TRAINING_STEPS
    for call, parts in forward:
        total = call.inputs["x"].double() + torch.stack([part.outputs["y"] for part in parts]).sum(dim=0)
        torch.testing.assert_close(total, call.outputs["y"].double(), rtol=0, atol=1e-4)
    for (block, stream), rows in found.truth.streams.items():
        if stream.endswith("out"):
            keyed = rows @ found.truth.keys[block, stream]
            torch.testing.assert_close(found.sample.view.rows(block, stream), keyed, rtol=0, atol=1e-4)


def test_one_key_for_all_is_linked_at_few_tokens(biased: tuple[Recorded, list[tuple[Call, list[Call]]]]) -> None:
    """A24 under `stream` needs no more than the sum itself, biases or none."""
    sample, truth = biased[0].cut(16)
    links = linking.link_all(sample.view, orthogonal=True)
    assert all(torch.equal(link.joined, torch.eye(64, dtype=torch.float64)) for link in links)
    score = linking.ATTACK.score(links, truth)
    assert score.success > 0.99
    stolen = assemble(sample.view, links)
    for block, parts in enumerate(stolen.biases):
        for role in ("out", "down"):
            keyed = truth.private.bias(block, role) @ truth.keys[block, STREAMS_OF[role][1]]
            error = (parts[role] - keyed).norm() / keyed.norm()
            assert role == "out" or error < 1e-5  # that of attention undoes a secret bias of v too
            assert parts[role].norm() > 0.1


def test_a_body_is_read_part_by_part(recorded: Recorder) -> None:
    """`stream`: gradients of a step come in reverse."""
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


def test_texts_of_the_training_and_others_are_served_in_the_same_passes(recorded: Recorder) -> None:
    """A20 tells them apart; were they in passes of their own, it would tell passes apart."""
    found = recorded("balanced")
    counts = [texts for texts, _ in found.sample.view.texts]
    served = found.truth.tokens.view(sum(counts), -1)
    batches = found.truth.training.batches
    begins = torch.cat([batch[:, : served.shape[1]] for batch in batches])
    windows = torch.cat([batch.unfold(1, served.shape[1], 1).flatten(0, 1) for batch in batches])
    trained, anywhere = ((served[:, None] == texts).all(dim=2).any(dim=1) for texts in (begins, windows))
    several = [flags for flags in zip(trained.split(counts), anywhere.split(counts), strict=True) if len(flags[0]) > 3]
    assert several
    assert all(begun.any() and not inside.all() for begun, inside in several)


def test_times_and_sizes_are_there(recorded: Recorder) -> None:
    calls = [call for calls in recorded("balanced").sample.view.passes for call in calls]
    assert len(calls) > 8
    assert all(call.ended > call.started >= 0 for call in calls)
    assert all(call.sent > call.inputs["x"].nbytes for call in calls)
    assert all(call.received > call.outputs["y"].nbytes for call in calls)
