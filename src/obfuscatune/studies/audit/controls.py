"""What must be found, and what must not, before anything is concluded.

- *known key*: with the true keys, recorded rows and weights give the private model's; else the truth is misplaced.
- *coalition*: where a profile shares, one worker more than may collude has the private model's rows and weights. Where
  several workers have blocks under keys, the true keys give the private model's rows and weights of those that the
  watched ones have. Else being at chance may be the reader's fault.
- *positive*: each attack succeeds on the profile that it says it breaks; else being at chance elsewhere says nothing.
- *negative*: there, with an unrelated model as the base, or scored against another model's session, it is at chance;
  else its score finds success in anything.
- *canaries*: a fixed seed, four Householder reflections and a Kronecker product as keys are caught.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from obfuscatune.studies.audit.attacks import all_attacks
from obfuscatune.studies.audit.canaries import check_canaries
from obfuscatune.studies.audit.lab import Recorded, record
from obfuscatune.studies.audit.runner import (
    APART,
    REPETITIONS,
    Plan,
    budgets_of,
    corpus_of,
    fixtures_of,
    memory_gb,
    try_attack,
)
from obfuscatune.studies.audit.view import ROLES, STREAMS_OF
from obfuscatune.studies.audit.watched import Watched
from obfuscatune.studies.reproduce.cells import Cell

LEAST_WITH_KEY = 0.99
LEAST_TOGETHER = 0.99
_LARGEST = 4  # tokens per width of a control; more makes no attack weaker


def control_cells(plan: Plan, like: Cell) -> list[Cell]:
    """One cell for each seed and profile that an attack names, and one of canaries. like: a cell of the runner."""
    attacks = {name: all_attacks()[name] for name in plan.attacks}
    width = like.inputs["settings"]["width"]
    budgets = [tokens for tokens in plan.budgets if tokens <= _LARGEST * width] or [min(plan.budgets)]
    found = []
    for seed in plan.seeds:
        for profile in sorted({attack.fires_on for attack in attacks.values()}):
            inputs = {
                **like.inputs,
                "profile": profile,
                "seed": seed,
                "other": plan.other(seed),
                "budgets": budgets,
                "attacks": [name for name, attack in attacks.items() if attack.fires_on == profile],
            }
            label = f"controls on {profile}, seed {seed}"
            memory = 2 * memory_gb(plan.settings, budgets)  # two sessions
            found.append(
                Cell(label=label, compute=control_profile, inputs=inputs, places=like.places, memory_gb=memory)
            )
    inputs = {**like.inputs, "seed": plan.seeds[0], "budgets": budgets[:1]}
    for profile in plan.profiles:
        watched = Watched.parse(profile)
        if watched.profile.shares or watched.workers > 1:
            shared = {**inputs, "profile": profile}
            found.append(
                Cell(label=f"{profile}, pooled", compute=coalition, inputs=shared, places=like.places, memory_gb=4.0)
            )
    inputs = {**like.inputs, "seed": plan.seeds[0]}
    found.append(Cell(label="canaries", compute=canaries, inputs=inputs, places=like.places, memory_gb=2.0))
    return found


def repeated_controls(controlled: Sequence[Cell], failed: Sequence[str]) -> list[Cell]:
    """Cells of fresh sessions, for attacks whose negative control failed, as a broken claim is run again.

    Over two seeds the standard error is that of two numbers, and of no use as a limit where they happen to agree.
    """
    found = []
    for session in range(1, 1 + REPETITIONS):
        for cell in controlled:
            attacks = [attack for attack in cell.inputs["attacks"] if attack in failed]
            if attacks and cell.compute is control_profile:
                inputs = {**cell.inputs, "attacks": attacks, "session": session}
                found.append(replace(cell, label=f"{cell.label}, again {session}", inputs=inputs))
    return found


def control_profile(inputs: dict[str, Any], places: dict[str, Any]) -> dict[str, Any]:
    """Return ``{"positive": outcomes, "negative": outcomes, "known key": success}`` of one profile and seed."""
    fixtures = fixtures_of(inputs, places)
    other = fixtures_of(inputs, places, inputs["other"])
    later = APART * inputs.get("session", 0)
    recorded = record(fixtures, inputs["profile"], inputs["seed"] + later, inputs["budgets"])
    another = record(other, inputs["profile"], inputs["other"] + later, inputs["budgets"])
    corpus = corpus_of(fixtures)
    right: dict[str, Any] = {}
    wrong: dict[str, Any] = {}
    positive, negative = [], []
    for name in inputs["attacks"]:
        attack = all_attacks()[name]
        tokens = budgets_of(attack, inputs["budgets"], fixtures.settings.width)[-1]
        base, cache = (fixtures.private, dict[str, Any]()) if attack.exact else (fixtures.base, right)
        positive.append(try_attack(attack, recorded, base, corpus, tokens, cache, inputs))
        if attack.sham is not None:
            sham = replace(attack, run=attack.sham)
            negative.append(try_attack(sham, recorded, fixtures.base, corpus, tokens, right, inputs))
        elif "B" in attack.needs:
            negative.append(try_attack(attack, recorded, fixtures.unrelated, corpus, tokens, wrong, inputs))
        else:
            truth = another.cut(tokens)[1]
            negative.append(try_attack(attack, recorded, fixtures.base, corpus, tokens, right, inputs, truth))
    return {
        "positive": [asdict(outcome) for outcome in positive],
        "negative": [asdict(outcome) for outcome in negative],
        "known key": known_key(recorded),
    }


def canaries(inputs: dict[str, Any], places: dict[str, Any]) -> dict[str, Any]:
    """Return ``{"canaries": [{name, caught, detail}]}``."""
    return {"canaries": [asdict(canary) for canary in check_canaries(fixtures_of(inputs, places), inputs["seed"])]}


def coalition(inputs: dict[str, Any], places: dict[str, Any]) -> dict[str, Any]:
    """Return ``{"coalition": least share}``, see `share_together`; the least cosine of `known_key` under keys."""
    recorded = record(fixtures_of(inputs, places), inputs["profile"], inputs["seed"], inputs["budgets"])
    return {"coalition": known_key(recorded) if recorded.pooled is None else share_together(recorded)}


def share_together(recorded: Recorded) -> float:
    """Share of the private model's numbers that a coalition has, least over blocks, streams and weights.

    Up to one factor for each row and each column, which are the enclave's scales.
    """
    view, truth = recorded.pooled, recorded.truth
    if view is None:
        raise ValueError("a profile without shares")
    found = []
    for block in range(view.blocks):
        for role in ROLES:
            found.append(_same_up_to_scales(view.weight(block, role), truth.private.weight(block, role)))
            stream = STREAMS_OF[role][0]
            found.append(_same_up_to_scales(view.rows(block, stream), truth.streams[block, stream]))
    return min(found)


def _same_up_to_scales(found: Tensor, truth: Tensor) -> float:
    """Share of entries that agree to 5 %, of those that are not small, up to a factor for each row and column."""
    length = min(len(found), len(truth))
    found, truth = found[:length], truth[:length]
    large = truth.abs() > 0.1 * truth.square().mean().sqrt()
    ratio = torch.where(large, found / truth, torch.nan)
    for dim in (1, 0):
        ratio = ratio / ratio.nanmedian(dim=dim, keepdim=True).values
    return ((ratio - 1).abs()[large] < 0.05).double().mean().item()


def known_key(recorded: Recorded) -> float:
    """Least cosine, over blocks and streams, of rows and weights undone by the true keys with the private model's."""
    view, truth = recorded.sample.view, recorded.truth
    found = []
    for block in range(view.blocks):
        for role in ROLES:
            into, out = (truth.keys.get((block, stream)) for stream in STREAMS_OF[role])
            if into is None or view.mixed:
                continue
            rows = torch.linalg.solve(into, view.rows(block, STREAMS_OF[role][0]), left=False)
            found.append(_cosine(rows, truth.streams[block, STREAMS_OF[role][0]]))
        for role in ROLES:
            into, out = (truth.keys.get((block, stream)) for stream in STREAMS_OF[role])
            if into is not None and out is not None:
                weight = into @ torch.linalg.solve(out, view.weight(block, role), left=False)
                found.append(_cosine(weight, truth.private.weight(block, role)))
    return min(found)


def _cosine(a: Tensor, b: Tensor) -> float:
    return ((a * b).sum() / (a.norm() * b.norm())).item()  # type: ignore[no-any-return]
