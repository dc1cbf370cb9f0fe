"""The demo as a user runs it: a process of its own, the real worker, a few steps."""

import dataclasses
import re
from pathlib import Path

import pytest

from obfuscatune.cli import main
from obfuscatune.profiles import resolve
from obfuscatune.studies.bundled import BUNDLED_FAMILIES, demo_settings, model_directory
from obfuscatune.studies.demo.run import run_demo
from obfuscatune.studies.demo.story import html_page, summary, warning


@pytest.fixture(scope="module", params=BUNDLED_FAMILIES)
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    settings = dataclasses.replace(demo_settings(request.param), max_steps=4)
    output = tmp_path_factory.mktemp("demo")
    return run_demo(output, profile="balanced", worker="spawn", settings=settings, say=lambda line: None)


def test_protected_equals_clear(outcome) -> None:
    assert outcome.different_choices == 0
    assert len(outcome.clear.losses) == len(outcome.protected.losses) == 4
    assert outcome.largest_loss_difference < 1e-4  # measured 1e-6 over 30 steps
    assert outcome.clear.losses[0] > outcome.clear.losses[-1]


def test_before_is_chance(outcome) -> None:
    assert outcome.accuracy(outcome.before) == pytest.approx(0.25, abs=0.16)  # two standard errors of 32 questions


def test_the_adapter_is_an_ordinary_one(outcome) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_directory(outcome.settings.family))
    loaded = PeftModel.from_pretrained(base, outcome.adapter)
    assert set(loaded.peft_config) == {"default"}


def test_what_is_shown(outcome, tmp_path: Path) -> None:
    text = summary(outcome)
    for part in ("chance 25 %", "loss curves apart", "crossed the boundary", "cryptographic boundary"):
        assert part in text
    shown = html_page(outcome)
    assert shown.count("<svg") == 2 and "What this does not show" in shown


@pytest.mark.parametrize("outcome", ["gpt2"], indirect=True)
def test_the_readme_shows_lines_that_the_demo_prints(outcome) -> None:
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    shown = readme.split("## What the demo prints")[1].split("```")[1].strip().splitlines()

    def form(line: str) -> str:
        return re.sub(r"[\d.,]+(e[-+]\d+)?", "#", " ".join(line.split()))

    printed = {form(line) for line in summary(outcome).splitlines()}
    assert len(shown) > 8
    assert [line for line in shown if form(line) not in printed] == []


def test_the_command_takes_the_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--materials_only", "--family", "llama", "--output_dir", str(tmp_path)]) == 0
    assert '"model_type": "llama"' in (tmp_path / "model" / "config.json").read_text()
    assert main(["demo", "--family", "opt", "--output_dir", str(tmp_path)]) == 2
    assert "expected gpt2 or llama" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["--profile", "none"], ["--worker", "none"]])
def test_options_that_cannot_be_are_refused_before_the_work(
    wrong: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", *wrong, "--max_steps", "1", "--output_dir", str(tmp_path)]) == 2
    assert "got 'none'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("outcome", ["gpt2"], indirect=True)
@pytest.mark.parametrize(
    ("profile", "said", "unsaid"),
    [("enclave", "in one process", "keys"), ("shared", "all the shares", "keys"), ("plain", "no keys", "hide")],
)
def test_what_is_not_shown_fits_the_profile(outcome, profile: str, said: str, unsaid: str) -> None:
    report = dataclasses.replace(outcome.report, profile=resolve(profile))
    shown = warning(dataclasses.replace(outcome, report=report))
    assert said in shown and unsaid not in shown


@pytest.mark.parametrize(
    "verb", [["demo"], ["reproduce", "accuracy", "--preset", "tiny"], ["audit", "--profile", "balanced"]]
)
def test_results_that_could_not_be_written_are_refused_before_the_work(
    verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("kept")
    option = "--out" if verb[0] == "audit" else "--output_dir"
    for place, message in (
        ("file", "not an output directory: got a file"),
        ("/proc/x/y", "cannot write into the directory"),
    ):
        assert main([*verb, option, str(tmp_path / place)]) == 2
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
