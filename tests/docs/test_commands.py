"""Every command line on the pages is one of this version: its verb, and each of its options."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from obfuscatune.cli import build_app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "for").glob("*.md"))]
PROMPT = r"^(?:\w*\$ )?"
OTHERS = {"lm-eval"}  # whose options are mostly the harness' own


def command_lines(text: str) -> list[list[str]]:
    """The words after ``obfuscatune`` of each command in code, continued lines joined, comments left out."""
    text = text.replace("\\\n", " ")
    lines = re.findall(rf"{PROMPT}obfuscatune ([^\n]*)$", text, re.MULTILINE) + re.findall(
        r"`obfuscatune ([^`\n]+)(?<! 1)`",
        text,  # `obfuscatune sealed file 1` names a format
    )
    found = []
    for line in lines:
        for part in re.split(r" && obfuscatune | \| | 2>", f"{line} ".split(" #")[0]):
            words = shlex.split(part.replace("'", " ").replace('"', " "), comments=False)
            found.append([word.strip(",;:.)`") for word in words if word != "&"])
    return [words for words in found if words]


def unknown(words: list[str], command: Any) -> str:
    """What of a command line this version does not have; empty where it has all of it."""
    while hasattr(command, "commands"):
        if not words or words[0].startswith("-"):
            break
        if words[0] not in command.commands:
            return words[0]
        if words[0] in OTHERS:
            return ""
        command, words = command.commands[words[0]], words[1:]
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    given = [word.split("=")[0] for word in words if re.fullmatch(r"--[a-z][\w-]*(=.*)?", word)]
    return ", ".join(option for option in given if option not in known | {"--help", "--version"})


@pytest.fixture(scope="module")
def root() -> Any:
    return typer.main.get_command(build_app())


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_of_a_page(page: Path, root: Any) -> None:
    wrong = {" ".join(words): fault for words in command_lines(page.read_text()) if (fault := unknown(words, root))}
    assert wrong == {}


def test_wrong_commands_are_seen(root: Any) -> None:
    text = "obfuscatune finetun --x\n$ obfuscatune finetune --no_such 1 --profile paper\n`obfuscatune job run x --gone`"
    assert [unknown(words, root) for words in command_lines(text)] == ["finetun", "--no_such", "--gone"]
    assert sum(len(command_lines(page.read_text())) for page in PAGES) > 60
