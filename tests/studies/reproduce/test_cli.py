"""``obfuscatune reproduce`` on the command line: its help, and what it refuses before it computes anything."""

from pathlib import Path

import pytest

from obfuscatune.cli import main
from obfuscatune.cli.reproduce import COMMANDS


@pytest.mark.parametrize("verb", COMMANDS)
def test_help_ends_with_examples_of_options_that_exist(
    verb: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["reproduce", verb, "--help"]) == 0
    out = capfd.readouterr().out
    assert "…" not in out, "an option's name is cut"
    options, _, examples = out.partition("Examples:")
    assert f"obfuscatune reproduce {verb}" in examples
    assert {word for word in examples.split() if word.startswith("--")} <= {*options.split()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "records,hellaswag"), "unknown task"),
        (("--seeds", "0,one"), "a seed is no number"),
        (("--seeds", "-1"), "a seed is negative"),
        (("--sizes", "xl"), "unknown size"),
        (("--data_dir", "none", "--tasks", "sciq"), "no data of the task"),
        (("--model_name_or_path", "./none"), "no such model directory"),
    ],
)
def test_bad_options_are_one_line(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ["reproduce", "accuracy", "--preset", "tiny", "--output_dir", str(tmp_path / "out"), *arguments]
    assert main(given) == 2
    printed = capfd.readouterr()
    assert printed.out == "" and message in printed.err and "Traceback" not in printed.err
    assert not (tmp_path / "out" / "cells").exists()


@pytest.mark.parametrize("study", ["accuracy", "conditioning", "cost"])
def test_a_device_that_is_not_there_is_refused(study: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for device in ("nosuch", "cuda:99", "meta"):
        given = ["reproduce", study, "--preset", "tiny", "--output_dir", str(tmp_path / "out"), "--device", device]
        assert main(given) == 2
        assert f"device not available: got {device}" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
