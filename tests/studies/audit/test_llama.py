"""The audit on models with grouped kv heads, rotary positions, RMSNorm and a gated MLP."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from obfuscatune.profiles import resolve
from obfuscatune.studies.audit.attack import Score
from obfuscatune.studies.audit.attacks import all_attacks, theft
from obfuscatune.studies.audit.attacks.multiset import find_order
from obfuscatune.studies.audit.controls import known_key
from obfuscatune.studies.audit.fixtures import Fixtures, build, load_text, settings_of
from obfuscatune.studies.audit.lab import Recorded, knowledge, record
from obfuscatune.studies.audit.reference import Reference
from obfuscatune.studies.audit.study import failed_claims, make_plan, run
from obfuscatune.studies.audit.verdict import LEAK
from obfuscatune.studies.audit.view import ROLES

pytestmark = pytest.mark.slow

STATIC = ["paper", "balanced", "balanced+attention=enclave+mlp=enclave", "stream"]
Recorder = Callable[[str], Recorded]


@pytest.fixture(scope="module")
def models(trained: Path) -> Fixtures:
    return build(settings_of("tiny", "llama"), 0, trained, load_text())


@pytest.fixture(scope="module")
def sessions(models: Fixtures) -> Recorder:
    return cache(lambda profile: record(models, profile, 0, (64, 256)))


def score(attack: str, profile: str, models: Fixtures, sessions: Recorder, base: object = None) -> Score:
    found, recorded = all_attacks()[attack], sessions(profile)
    sample, truth = recorded.cut(256)
    public = models.base if base is None else base
    told = knowledge(recorded, found.needs, public, models.text["corpus"][-64:], {}, truth)
    return found.score(found.run(sample, told), truth)


def test_kv_heads_are_fewer(models: Fixtures) -> None:
    shape = Reference(models.private, resolve("balanced")).design().shape
    assert (shape.heads, shape.kv_heads, shape.rotary) == (4, 2, 16)


@pytest.mark.parametrize("profile", [*STATIC, "strict"])
def test_true_keys_give_the_private_models_rows_and_weights(profile: str, sessions: Recorder) -> None:
    assert known_key(sessions(profile)) > 0.999


@pytest.mark.parametrize("profile", ["balanced", "stream"])
def test_what_the_worker_computes_inside_gives_what_it_answered(profile: str, sessions: Recorder) -> None:
    view = sessions(profile).sample.view
    for block in range(view.blocks):
        for stream, role, out in (("heads", "out", "attention out"), ("activations", "down", "mlp out")):
            product = view.rows(block, stream) @ view.weight(block, role)
            bias = view.segment(block, role).bias(role)
            product = product if bias is None else product + bias
            assert torch.allclose(product, view.rows(block, out), atol=1e-4)


def test_masks_and_rotary_tables_cross_once_a_pass(sessions: Recorder) -> None:
    view = sessions("balanced").sample.view
    assert view.passes
    for calls in view.passes:
        assert [call.rotary is not None for call in calls if call.segment.roles[0] == "qkv"] == [True] * view.blocks
        assert len({id(call.rotary[0]) for call in calls if call.rotary is not None}) == 1


@pytest.mark.parametrize(
    ("attack", "profile", "least"),
    [
        ("A1", "paper", 0.6),
        ("A7", "paper", 0.9),
        ("A8", "paper", 0.8),
        ("A6", "balanced", 0.3),
        *((name, "balanced", 0.9) for name in ("A9", "A10", "A11", "A16", "A18", "A22", "A24")),
        *((name, "balanced", 0.5) for name in ("A3", "A5", "A12", "A17", "A26")),
        *((name, "stream", 0.5) for name in ("A3", "A5", "A10", "A12", "A16", "A17", "A24")),
    ],
)
def test_what_it_breaks(attack: str, profile: str, least: float, models: Fixtures, sessions: Recorder) -> None:
    assert score(attack, profile, models, sessions).success > least


@pytest.mark.parametrize("attack", ["A1", "A3", "A7", "A12", "A17", "A24"])
def test_what_it_does_not(attack: str, models: Fixtures, sessions: Recorder) -> None:
    found = score(attack, "strict", models, sessions)
    assert found.success < found.chance + 0.1


@pytest.mark.parametrize("attack", ["A3", "A5", "A6", "A16", "A17"])
def test_an_unrelated_base_helps_nothing(attack: str, models: Fixtures, sessions: Recorder) -> None:
    found = score(attack, "balanced", models, sessions, models.unrelated)
    assert found.success < found.chance + 0.05


def test_an_order_alone_is_on_the_gate_and_sizes_besides_on_the_rest(models: Fixtures, sessions: Recorder) -> None:
    recorded = sessions("balanced")
    order = find_order(recorded.sample.view, Reference(models.private, recorded.profile), 0)
    sizes = order.scale.abs()
    assert 0.5 <= sizes.min() < 0.7
    assert 1.4 < sizes.max() <= 2.001
    assert 0.3 < (order.scale > 0).double().mean() < 0.7
    gate = recorded.sample.view.weight(0, "up")[:, order.places]
    plain = recorded.truth.private.weight(0, "up")[:, : len(sizes)]
    torch.testing.assert_close(gate.norm(dim=0), plain.norm(dim=0), rtol=1e-5, atol=0)


def test_a_body_of_plain_weights_is_the_model(models: Fixtures) -> None:
    """What A25 assembles: with true weights, embeddings and head it has the private model's logits."""
    private = Reference(models.private, resolve("balanced"))
    weights = [{role: private.weight(block, role) for role in ROLES} for block in range(private.blocks)]
    biases = [{role: private.bias(block, role) for role in ROLES} for block in range(private.blocks)]
    eyes = [torch.eye(private.width)] * (2 * private.blocks)
    words, places = private.embeddings()
    known = torch.ones(len(words), dtype=torch.bool)
    body = theft.Body(
        theft.Blocks(weights, biases, eyes, eyes), theft.Tables(words, places, known), private.design(), frozen=True
    )
    ids = models.text["private"][:2]
    with torch.no_grad():
        body.head.copy_(models.private.model.norm.weight.diag())
        torch.testing.assert_close(body(ids).double(), private.logits(ids), rtol=0, atol=1e-3)


def test_a_short_audit(trained: Path, tmp_path: Path) -> None:
    """In two minutes: `balanced` is broken at 4d tokens, `strict` is not, and the report says of what model.

    Attacks whose controls run on one profile, to be quick; others are in the tests above.
    """
    plan = make_plan(
        model="tiny",
        architecture="llama",
        profiles=["balanced", "strict"],
        knowledge=["N", "B", "Q"],
        attacks=["A3", "A5", "A12", "A24"],
        tokens="4d",
        seeds=2,
    )
    (tmp_path / "fixtures").symlink_to(trained)
    path, findings = run(plan, tmp_path, command=["audit"])
    assert findings.conclusive
    assert failed_claims(findings) == []
    leaks = {v.attack for v in findings.verdicts if v.profile == "balanced" and v.word == LEAK}
    assert leaks == {"A3", "A5", "A12", "A24"}
    assert "tiny llama: d = 64, 2 blocks, 4 heads, 2 of k and v" in path.read_text()
