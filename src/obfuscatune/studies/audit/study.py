"""A whole audit: cells, controls, verdicts, report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from obfuscatune.errors import UsageError
from obfuscatune.studies.audit.attack import NEEDS
from obfuscatune.studies.audit.attacks import all_attacks
from obfuscatune.studies.audit.controls import LEAST_TOGETHER, LEAST_WITH_KEY, control_cells, repeated_controls
from obfuscatune.studies.audit.fixtures import ARCHITECTURES, SETTINGS
from obfuscatune.studies.audit.report import Findings, write_findings
from obfuscatune.studies.audit.runner import Outcome, Plan, cells, parse_budgets, repeated_cells
from obfuscatune.studies.audit.verdict import BROKEN, Control, Verdict, judge, negative, positive
from obfuscatune.studies.audit.watched import Watched
from obfuscatune.studies.reports.provenance import describe
from obfuscatune.studies.reproduce.cells import Cell, CellCache, run_cells


def make_plan(
    *,
    model: str,
    architecture: str = "gpt2",
    profiles: Sequence[str],
    knowledge: Sequence[str],
    attacks: Sequence[str],
    tokens: str,
    seeds: int,
) -> Plan:
    """Return what is run, checked as a whole.

    Args:
        knowledge: letters of what the attacker has; attacks that need more are left out. attacks: only these, all
            where empty.

    Raises:
        UsageError: an unknown model, architecture, profile, letter or attack; a profile that hands nothing over; no
            attack left, or one of those that were named.
    """
    if model not in SETTINGS:
        raise UsageError("unknown model", got=model, expected=", ".join(SETTINGS), where="--model")
    if architecture not in ARCHITECTURES:
        expected = ", ".join(ARCHITECTURES)
        raise UsageError("unknown architecture", got=architecture, expected=expected, where="--architecture")
    unknown = sorted(set(knowledge) - set(NEEDS))
    if unknown:
        expected = "; ".join(f"{letter}: {text}" for letter, text in NEEDS.items())
        raise UsageError("unknown knowledge", got=", ".join(unknown), expected=expected, where="--knowledge")
    for profile in profiles:
        if not Watched.parse(profile).profile.remote:
            raise UsageError("a profile that hands nothing over", got=profile, where="--profile")
    known = all_attacks()
    strangers = sorted(set(attacks) - set(known))
    if strangers:
        raise UsageError("unknown attack", got=", ".join(strangers), expected=", ".join(known), where="--attacks")
    has = {"N", *knowledge}
    chosen = [n for n, attack in known.items() if set(attack.needs) <= has and (not attacks or n in attacks)]
    if not profiles or not (chosen or attacks):
        raise UsageError("nothing to run", got=f"{len(chosen)} attacks, {len(profiles)} profiles")
    if left_out := [name for name in dict.fromkeys(attacks) if name not in chosen]:
        needed = sorted({letter for name in left_out for letter in known[name].needs} - has)
        got, expected = ", ".join(left_out), f"--knowledge with {','.join(needed)} too"
        raise UsageError("attacks that need more knowledge", got=got, expected=expected, where="--attacks")
    budgets = parse_budgets(tokens, SETTINGS[model].width)
    return Plan(
        model=model,
        architecture=architecture,
        profiles=tuple(dict.fromkeys(profiles)),
        attacks=tuple(chosen),
        budgets=budgets,
        seeds=tuple(range(seeds)),
    )


def run(
    plan: Plan,
    out: Path,
    *,
    text_file: Path | None = None,
    workers: int = 1,
    command: Sequence[str] | None = None,
) -> tuple[Path, Findings]:
    """Run what is not in ``out/cells`` yet, write the report, and return its Markdown's path and the findings.

    Args:
        text_file: what fixtures are trained on, instead of the standard library's documentation.
        workers: cells at a time.
    """
    cache = CellCache(out / "cells")
    attacked = cells(plan, out / "fixtures", text_file)
    controlled = control_cells(plan, attacked[0])
    values = run_cells([*attacked, *controlled], cache, workers=workers)
    outcomes = _outcomes(values[: len(attacked)])
    answers = values[len(attacked) :]
    controls = _controls(plan, controlled, answers)
    failed = [control.name for control in controls if control.kind == "negative" and not control.passed]
    if more := repeated_controls(controlled, failed):
        controlled, answers = [*controlled, *more], [*answers, *run_cells(more, cache, workers=workers)]
        controls = _controls(plan, controlled, answers)
    verdicts = _judge(plan, outcomes, controls)
    broken = [(verdict.profile, verdict.attack) for verdict in verdicts if verdict.word == BROKEN]
    again = repeated_cells(plan, attacked, broken)
    if again:
        verdicts = _judge(plan, outcomes + _outcomes(run_cells(again, cache, workers=workers)), controls)
    settings = plan.settings
    grouped = f", {settings.kv_heads} of k and v" if settings.architecture == "llama" else ""
    findings = Findings(
        attacks={name: all_attacks()[name] for name in plan.attacks},
        profiles=plan.profiles,
        verdicts=verdicts,
        controls=controls,
        width=settings.width,
    )
    provenance = {
        **describe(command, seeds=plan.seeds),
        "model": f"{plan.model} {settings.architecture}: d = {settings.width}, {settings.layers} blocks, "
        f"{settings.heads} heads{grouped}",
        "token budgets": ", ".join(map(str, plan.budgets)),
        "text": "documentation of Python's standard library" if text_file is None else str(text_file),
        "cells of commits": cache.commits([*attacked, *controlled, *again]),
    }
    return write_findings(out, findings, provenance), findings


def _outcomes(values: Sequence[dict[str, Any]]) -> list[Outcome]:
    return [Outcome(**outcome) for value in values for outcome in value["outcomes"]]


def _judge(plan: Plan, outcomes: Sequence[Outcome], controls: Sequence[Control]) -> list[Verdict]:
    passed = {(control.name, control.kind): control.passed for control in controls}
    return [
        judge(
            profile,
            attack,
            [o for o in outcomes if (o.profile, o.attack) == (profile, attack)],
            fires=passed[attack, "positive"],
            silent=passed[attack, "negative"],
        )
        for profile in plan.profiles
        for attack in plan.attacks
    ]


def failed_claims(findings: Findings) -> list[Verdict]:
    """Claims that do not hold or are not concluded; all of them where nothing is concluded at all."""
    return findings.failed if findings.conclusive else [verdict for verdict in findings.verdicts if verdict.claimed]


def _controls(
    plan: Plan, controlled: Sequence[Cell], values: Sequence[dict[str, list[dict[str, object]]]]
) -> list[Control]:
    attacks = all_attacks()
    by_kind: dict[str, list[Outcome]] = {"positive": [], "negative": []}
    found: list[Control] = []
    known: dict[str, list[float]] = {}
    for cell, value in zip(controlled, values, strict=True):
        for canary in value.get("canaries", ()):
            detail = str(canary["detail"])
            found.append(Control(str(canary["name"]), "canary", bool(canary["caught"]), detail, "caught"))
        if "coalition" in value:
            share: float = value["coalition"]  # type: ignore[assignment]
            passed, got = share >= LEAST_TOGETHER, f"{share:.4f}"
            found.append(Control(cell.inputs["profile"], "coalition", passed, got, f"at least {LEAST_TOGETHER}"))
        if "known key" in value:
            known.setdefault(cell.inputs["profile"], []).append(value["known key"])  # type: ignore[arg-type]
        for kind, outcomes in by_kind.items():
            outcomes += [Outcome(**o) for o in value.get(kind, ())]  # type: ignore[arg-type]
    for profile, cosines in known.items():
        least = min(cosines)
        found.append(
            Control(profile, "known key", least >= LEAST_WITH_KEY, f"{least:.4f}", f"at least {LEAST_WITH_KEY}")
        )
    for name in plan.attacks:
        attack = attacks[name]
        mine = {kind: [o for o in outcomes if o.attack == name] for kind, outcomes in by_kind.items()}
        found.append(positive(name, mine["positive"], attack.fires_at, attack.fires_on))
        found.append(negative(name, mine["negative"], attack.fires_on))
    return found
