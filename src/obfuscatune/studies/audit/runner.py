"""Attacks x profiles x token budgets x seeds, as cells that are each run once and kept."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from obfuscatune.errors import UsageError
from obfuscatune.studies.audit.attack import Attack, NotApplicableError, Truth
from obfuscatune.studies.audit.attacks import all_attacks
from obfuscatune.studies.audit.fixtures import Fixtures, FixtureSettings, build, load_text, settings_of
from obfuscatune.studies.audit.lab import Recorded, knowledge, record
from obfuscatune.studies.reports.files import write_text
from obfuscatune.studies.reproduce.cells import Cell

CORPUS_ROWS = 64  # of public text that attackers run a base on
# Fresh sessions of each model where a claim was found broken. Over five seeds, three standard errors are exceeded by
# chance in one cell of fifty, and some forty are claimed: noise fades in twenty sessions, what was none stays.
REPETITIONS = 3
APART = 1_000  # between the texts of two sessions of one model


@dataclass(frozen=True, slots=True)
class Outcome:
    """One attack, once. ``reason``: why it could not be run; the figures are None then."""

    profile: str
    attack: str
    tokens: int
    seed: int
    success: float | None
    chance: float | None
    value: float | None
    reason: str | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is run: names of fixtures, profiles and attacks, budgets in tokens, seeds."""

    model: str
    architecture: str
    profiles: tuple[str, ...]
    attacks: tuple[str, ...]
    budgets: tuple[int, ...]
    seeds: tuple[int, ...]

    @property
    def settings(self) -> FixtureSettings:
        """Of the fixtures."""
        return settings_of(self.model, self.architecture)

    def other(self, seed: int) -> int:
        """Another seed, whose session negative controls score against.

        Of two seeds the second gets a third: two that are scored against each other give one figure twice, whose
        standard error is 0 and no limit.
        """
        following = self.seeds.index(seed) + 1
        last = following == len(self.seeds)
        return seed + 1 if last and len(self.seeds) < 3 else self.seeds[following % len(self.seeds)]


def parse_budgets(text: str, width: int) -> tuple[int, ...]:
    """Return the numbers of tokens that ``d/4,d,4d,100d`` or plain numbers name, ascending.

    Raises:
        UsageError: not such a list, or a number that is no multiple of a quarter of the width.
    """
    found = []
    for word in text.replace(" ", "").split(","):
        head, marked, tail = word.partition("d")
        try:
            if not marked:
                tokens = int(head)
            elif tail:
                tokens = width // int(tail.removeprefix("/"))
            else:
                tokens = width * int(head or 1)
        except (ValueError, ZeroDivisionError):
            raise UsageError(
                "token budgets", got=word, expected="for instance d/4,d,4d,100d", where="--tokens"
            ) from None
        if tokens < 1 or tokens % (width // 4):
            raise UsageError(
                "a token budget", got=tokens, expected=f"a multiple of {width // 4}, a quarter of d", where="--tokens"
            )
        found.append(tokens)
    return tuple(sorted(set(found)))


def cells(plan: Plan, cache: Path, text_file: Path | None) -> list[Cell]:
    """One cell for each profile and seed, with all its attacks; the fixtures are made once before."""
    text = load_text(text_file)
    kept = cache / "text.txt"  # the documentation takes seconds to read
    write_text(kept, text)
    for seed in {*plan.seeds, *map(plan.other, plan.seeds)}:
        build(plan.settings, seed, cache, text)
    common = {
        "settings": asdict(plan.settings),
        "attacks": list(plan.attacks),
        "budgets": list(plan.budgets),
        "text": sha256(text.encode()).hexdigest(),
        "threads": torch.get_num_threads(),
    }
    places = {"cache": str(cache), "text_file": str(kept)}
    return [
        Cell(
            label=f"{profile}, seed {seed}",
            compute=attack_profile,
            inputs={**common, "profile": profile, "seed": seed},
            places=places,
            memory_gb=memory_gb(plan.settings, plan.budgets),
        )
        for seed in plan.seeds
        for profile in plan.profiles
    ]


def memory_gb(settings: FixtureSettings, budgets: Sequence[int]) -> float:
    """What recording and attacking one session takes at most, GiB.

    The streams of a block are 16 widths together, and they are there three times, in float64 or as much: the truth,
    what crossed, and that as an attack reads it. 3.5 GiB were seen for 12,800 tokens of ``small``.
    """
    return 2.0 + 3 * 16 * 8 * max(budgets) * settings.width * settings.layers / 2**30


def repeated_cells(plan: Plan, like: Sequence[Cell], broken: Sequence[tuple[str, str]]) -> list[Cell]:
    """Cells of fresh sessions, for profiles and attacks where a claim was found broken. like: those that found it."""
    found = []
    for session in range(1, 1 + REPETITIONS):
        for cell in like:
            profile, seed = cell.inputs["profile"], cell.inputs["seed"]
            attacks = [attack for where, attack in broken if where == profile]
            if attacks:
                inputs = {**cell.inputs, "attacks": attacks, "session": session}
                label = f"{profile}, seed {seed}, again {session}"
                found.append(replace(cell, label=label, inputs=inputs))
    return found


def attack_profile(inputs: dict[str, Any], places: dict[str, Any]) -> dict[str, Any]:
    """Record one private model under one profile, and run all attacks on it: ``{"outcomes": [...]}``."""
    fixtures = fixtures_of(inputs, places)
    seed = inputs["seed"] + APART * inputs.get("session", 0)
    recorded = record(fixtures, inputs["profile"], seed, inputs["budgets"])
    attacks = all_attacks()
    shared: dict[str, Any] = {}
    outcomes = []
    for name in inputs["attacks"]:
        attack = attacks[name]
        for tokens in budgets_of(attack, inputs["budgets"], fixtures.settings.width):
            outcomes.append(try_attack(attack, recorded, fixtures.base, corpus_of(fixtures), tokens, shared, inputs))
    return {"outcomes": [asdict(outcome) for outcome in outcomes]}


def fixtures_of(inputs: dict[str, Any], places: dict[str, Any], seed: int | None = None) -> Fixtures:
    """Return the fixtures that a cell's inputs name, from the cache; those of another seed where one is given."""
    torch.set_num_threads(inputs["threads"])
    text = load_text(Path(places["text_file"]))
    settings = FixtureSettings(**inputs["settings"])
    return build(settings, inputs["seed"] if seed is None else seed, Path(places["cache"]), text)


def corpus_of(fixtures: Fixtures) -> Tensor:
    """Public text like the private one, not in what a customer queries either."""
    return fixtures.text["corpus"][-CORPUS_ROWS:]


def budgets_of(attack: Attack, budgets: Sequence[int], width: int) -> list[int]:
    """Return the budgets that an attack is run with."""
    fitting = [tokens for tokens in budgets if attack.largest is None or tokens <= attack.largest * width]
    return (fitting or [min(budgets)]) if attack.by_tokens else (fitting or [min(budgets)])[-1:]


def try_attack(
    attack: Attack,
    recorded: Recorded,
    base: Any,
    corpus: Tensor,
    tokens: int,
    cache: dict[str, Any],
    inputs: dict[str, Any],
    truth: Truth | None = None,
) -> Outcome:
    """Run one attack with one budget. truth: another one to score against, for a negative control."""
    sample, own = recorded.cut(tokens)
    told = knowledge(recorded, attack.needs, base, corpus, cache, own)
    common = (inputs["profile"], attack.id, tokens, inputs["seed"])
    started = time.perf_counter()
    try:
        score = attack.score(attack.run(sample, told), own if truth is None else truth)
    except NotApplicableError as reason:
        return Outcome(*common, None, None, None, str(reason), time.perf_counter() - started)
    return Outcome(*common, score.success, score.chance, score.value, None, time.perf_counter() - started)
