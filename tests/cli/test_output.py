"""What is asked of a terminal that is not there, and a directory that is another one by the time it is written into."""

import io
import sys
from pathlib import Path

import pytest

from obfuscatune.cli.asking import ask
from obfuscatune.cli.output import OneWriter
from obfuscatune.errors import UsageError


@pytest.mark.parametrize("given", [None, b"", b"\xff\xfe\n", b"no\n"])
def test_what_is_no_yes_signs_nothing(given: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = None if given is None else io.TextIOWrapper(io.BytesIO(given), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", answer)  # None: as Python has it where it was closed before the start
    with pytest.raises(UsageError, match="answer to `sign this"):
        ask("sign this?", yes=False)


def test_a_directory_that_was_made_anew_is_locked_anew(tmp_path: Path) -> None:
    directory = tmp_path / "out"
    directory.mkdir()
    with OneWriter(directory) as first:
        first.take()
        directory.rmdir()
        directory.mkdir()
        first.take()
        with OneWriter(directory) as second, pytest.raises(UsageError, match="another run writes"):
            second.take()
    with OneWriter(directory) as third:
        third.take()
