"""The question before a signature: what was shown is signed only where somebody says so."""

import sys

from obfuscatune.errors import UsageError


def ask(question: str, yes: bool) -> None:
    """Ask at the terminal, unless ``yes`` says that the answer is known.

    Raises:
        UsageError: the answer is not ``y``, or there is none.
    """
    if yes:
        return
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    try:
        line = sys.stdin.readline() if sys.stdin is not None else ""  # None where it was closed before the start
    except UnicodeDecodeError:
        line = "\N{REPLACEMENT CHARACTER}\n"
    if not line.endswith("\n"):
        print(file=sys.stderr)  # input has ended, and so has no end of line that the terminal would show
    answer = line.strip().lower()
    if answer not in ("y", "yes"):
        hint = "--yes does it without being asked"
        raise UsageError(f"answer to `{question}`", got=answer[:10] or "none", expected="y", hint=hint)
