"""``obfuscatune audit``: run the published attacks on what the worker is handed, and say what leaks."""

# ruff: noqa: RUF009 - option() makes a field, which is what the rule wants there

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import typer

from obfuscatune.cli.options import option, takes
from obfuscatune.cli.output import check_place

EPILOG = (
    "Exit code: 1 where a claimed cell is broken, or where nothing can be concluded of one.\n\n"
    "Examples:\n\nobfuscatune audit --profile paper,balanced,strict --out results/audit\n\n"
    "obfuscatune audit --profile strict --knowledge N,B --tokens d/4,d,4d,100d --model small --out results/audit"
)
_DEFAULT_PROFILES = "paper,balanced,stream,strict,shared"


@dataclass(frozen=True, kw_only=True)
class AuditOptions:
    """Options of ``obfuscatune audit``."""

    out: Path = option("directory for the report; what is in its cells/ is not run again")
    profile: str = option(
        "NAME[+switch=value] of a profile, with commas; NAME@KofN: K of N workers pool what they recorded",
        _DEFAULT_PROFILES,
    )
    knowledge: str = option(
        "what the attacker has: N nothing, B public base, P known text, E embeddings, Q own queries", "N,B,P,E,Q"
    )
    tokens: str = option("budgets of text that the worker has seen; d is the model's width", "d/4,d,4d,100d")
    model: Literal["tiny", "small", "large", "near-0.5", "near-1.5", "near-3.5", "near-10"] = option(
        "size of the test models, trained in minutes; large: half an hour, and 16 GiB to attack 100d tokens; near-N: "
        "wide models whose private model differs from its base by N %, for A27",
        "small",
    )
    architecture: Literal["gpt2", "llama"] = option(
        "architecture of the test models; llama: rotary positions, grouped kv heads, gated MLP", "gpt2"
    )
    seeds: int = option("private models, each with keys and text of its own", 5, min=1)
    attacks: str = option("only these, as A7,A24; default: all that the knowledge allows", "")
    text_file: Path | None = option(
        "text to train the test models on; default: the standard library's documentation", None
    )
    workers: int = option("cells at a time", 1, min=1)


@takes(AuditOptions)
def command(options: AuditOptions) -> None:
    """Record sessions as an operator would, run the attacks on them with their controls, and report what leaks."""
    from obfuscatune.studies.audit.study import failed_claims, make_plan, run

    plan = make_plan(
        model=options.model,
        architecture=options.architecture,
        profiles=_words(options.profile),
        knowledge=_words(options.knowledge),
        attacks=_words(options.attacks),
        tokens=options.tokens,
        seeds=options.seeds,
    )
    check_place(options.out, f"--out {options.out}")
    path, findings = run(plan, options.out, text_file=options.text_file, workers=options.workers)
    print(path.read_text(encoding="utf-8"))
    if failed_claims(findings):
        raise typer.Exit(1)


def _words(text: str) -> list[str]:
    return [word for word in text.replace(" ", ",").split(",") if word]
