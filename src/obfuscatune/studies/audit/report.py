"""The audit's result as a table profile x attack, figures, one page and JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from obfuscatune.studies.audit.attack import NEEDS, Attack
from obfuscatune.studies.audit.verdict import AS_CLAIMED, BROKEN, CHANCE, LEAK, NONE, VOID, Control, Verdict
from obfuscatune.studies.reports.figures import COLOURS, new_figure, style
from obfuscatune.studies.reports.files import write_json
from obfuscatune.studies.reports.report import write_report
from obfuscatune.studies.reports.tables import write_csv

Row = dict[str, Any]

ESSENTIAL = ("known key", "coalition", "canary")  # controls without which nothing is concluded
TITLE = "What the worker learns: attacks on what it is handed"
_COLOURS = {
    AS_CLAIMED: "#009E73",
    CHANCE: "#56B4E9",
    LEAK: "#E69F00",
    BROKEN: "#D55E00",
    VOID: "#CC79A7",
    NONE: "#dddddd",
}
_ABOUT = (
    "Models are small and trained for minutes; an attack that fails here may succeed elsewhere. Chance is no proof.",
    "Each attack runs on what a worker process wrote down: keyed weights, every tensor in and out, sizes, times.",
    f"{AS_CLAIMED}: at every budget. {LEAK}: found, as no claim denies. {CHANCE}: not found, yet no claim. "
    f"{BROKEN}: found, against a claim. {VOID}: nothing can be concluded. {NONE}: nothing of the kind is handed over.",
    "The figure is success at its most above chance, 1 being a full break; tokens are those of the least budget at "
    "which it was above chance by more than three standard errors over the seeds, and .02.",
    "A claimed cell that was above chance was run again in three fresh sessions of each model; all sessions count.",
    "`enclave` hands nothing over, so there is nothing to attack but the time of its answers.",
)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that a report is made of."""

    attacks: Mapping[str, Attack]
    profiles: Sequence[str]
    verdicts: Sequence[Verdict]
    controls: Sequence[Control]
    width: int

    @property
    def failed(self) -> list[Verdict]:
        """Claims that do not hold, or of which nothing can be concluded."""
        return [verdict for verdict in self.verdicts if verdict.failed]

    @property
    def conclusive(self) -> bool:
        """Whether what must be found was: without that nothing is concluded of anything."""
        return all(control.passed for control in self.controls if control.kind in ESSENTIAL)


def write_findings(directory: Path, findings: Findings, provenance: Row) -> Path:
    """Write ``audit.md``, ``.csv``, ``.json``, ``.html`` and two figures; return the path of the Markdown."""
    details = detail_rows(findings)
    with style():
        matrix, curves = draw_matrix(findings), draw_curves(findings)
    write_csv(directory / "audit.csv", details)
    document = {
        "provenance": provenance,
        "conclusive": findings.conclusive,
        "failed": [f"{verdict.attack} on {verdict.profile}" for verdict in findings.failed],
        "verdicts": [asdict(verdict) for verdict in findings.verdicts],
        "controls": [asdict(control) for control in findings.controls],
    }
    write_json(directory / "audit.json", document)
    tables = {
        "Profile and attack": matrix_rows(findings),
        "Controls": control_rows(findings),
        "The attacks": attack_rows(findings),
        "By token budget": details,
    }
    notes, figures = [*conclusions(findings), *_ABOUT], {"-matrix": matrix, "-tokens": curves}
    return write_report(directory / "audit", TITLE, notes, tables, figures, provenance)


def conclusions(findings: Findings) -> list[str]:
    """What the audit says, first of all whether it says anything."""
    lost = [control for control in findings.controls if not control.passed]
    if not findings.conclusive:
        names = ", ".join(f"{c.kind} {c.name}" for c in lost if c.kind in ESSENTIAL)
        return [f"**No conclusion.** Controls without which nothing is concluded failed: {names}."]
    notes = []
    for profile in findings.profiles:
        found = [verdict for verdict in findings.verdicts if verdict.profile == profile]
        counts = {word: sum(verdict.word == word for verdict in found) for word in _COLOURS}
        notes.append(f"`{profile}`: " + ", ".join(f"{word} {n}" for word, n in counts.items() if n) + ".")
    for verdict in findings.failed:
        notes.append(f"**A claim does not hold**: {verdict.attack} on `{verdict.profile}`: {verdict}.")
    if lost:
        names = ", ".join(f"{control.name} ({control.kind}: {control.got})" for control in lost)
        notes.append(f"Controls that failed, so that what depends on them is void: {names}.")
    return notes


def matrix_rows(findings: Findings) -> list[Row]:
    """One row for each attack, one column for each profile."""
    by_place = {(verdict.profile, verdict.attack): verdict for verdict in findings.verdicts}
    return [
        {
            "attack": f"{name} {attack.title}",
            "knows": attack.needs,
            **{profile: str(by_place[profile, name]) for profile in findings.profiles if (profile, name) in by_place},
        }
        for name, attack in findings.attacks.items()
    ]


def detail_rows(findings: Findings) -> list[Row]:
    """One row for each profile, attack and budget."""
    rows = []
    for verdict in findings.verdicts:
        common = {"profile": verdict.profile, "attack": verdict.attack, "verdict": verdict.word}
        for point in verdict.points:
            rows.append(
                {
                    **common,
                    "tokens": point.tokens,
                    "success": point.success,
                    "standard error": point.error,
                    "chance": point.chance,
                    "limit": point.limit,
                    "metric": point.value,
                    "reason": "",
                }
            )
        if not verdict.points:
            rows.append({**common, "reason": verdict.reason})
    return rows


def control_rows(findings: Findings) -> list[Row]:
    """One row for each control."""
    return [
        {"control": c.name, "kind": c.kind, "passed": c.passed, "got": c.got, "expected": c.expected}
        for c in findings.controls
    ]


def attack_rows(findings: Findings) -> list[Row]:
    """What each attack needs, measures and comes from."""
    return [
        {
            "id": attack.id,
            "attack": attack.title,
            "needs": "; ".join(NEEDS[letter] for letter in attack.needs),
            "success": attack.metric,
            "chance": attack.chance,
            "source": attack.source,
        }
        for attack in findings.attacks.values()
    ]


def draw_matrix(findings: Findings) -> Figure:
    """Return the table as coloured fields with the success in them; inside `style`."""
    names, profiles = list(findings.attacks), list(findings.profiles)
    plot = new_figure(max(0.36 * len(names) + 2.2, 4.5), 0.42 * len(profiles) + 1.2)  # room for the legend
    axes = plot.subplots()
    axes.grid(visible=False)
    for verdict in findings.verdicts:
        x, y = names.index(verdict.attack), profiles.index(verdict.profile)
        axes.add_patch(_field(x, y, _COLOURS[verdict.word]))
        if verdict.points:
            success = max(point.success for point in verdict.points)
            axes.text(x, y, f"{max(success, 0.0):.2f}".lstrip("0"), ha="center", va="center", fontsize=7)
    axes.set_xticks(range(len(names)), names, fontsize=7)
    axes.set_yticks(range(len(profiles)), profiles)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylim(len(profiles) - 0.5, -0.5)
    for word, colour in _COLOURS.items():
        axes.plot([], [], "s", color=colour, label=word)
    axes.legend(ncols=3, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.15 - 0.1 / len(profiles)))
    return plot


def _field(x: float, y: float, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.47, y - 0.45), 0.94, 0.9, color=colour)


def draw_curves(findings: Findings) -> Figure:
    """Return success against tokens, a field for each attack that has more than one budget; inside `style`."""
    shown = [n for n in findings.attacks if any(len(v.points) > 1 for v in findings.verdicts if v.attack == n)]
    columns = 4
    rows = max(1, -(-len(shown) // columns))
    plot = new_figure(9.0, 1.7 * rows + 0.5)
    fields = plot.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, name in zip(fields, shown, strict=False):
        for colour, profile in zip(COLOURS, findings.profiles, strict=False):
            points = next((v.points for v in findings.verdicts if (v.profile, v.attack) == (profile, name)), ())
            at = [point.tokens / findings.width for point in points]
            axes.errorbar(
                at, [p.success for p in points], [p.error for p in points], fmt="o-", color=colour, markersize=3, lw=1
            )
        axes.set_title(f"{name} {findings.attacks[name].title}", fontsize=7)
        axes.set_xscale("log")
        axes.set_ylim(-0.1, 1.05)
    for axes in fields[len(shown) :]:
        axes.set_axis_off()
    for colour, profile in zip(COLOURS, findings.profiles, strict=False):
        fields[0].plot([], [], "o-", color=colour, label=profile, markersize=3)
    plot.legend(*fields[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=7)
    plot.supxlabel("tokens of the session, per width d", fontsize=8)
    plot.supylabel("success", fontsize=8)
    return plot
