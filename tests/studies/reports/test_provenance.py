"""Results say where they come from, and never name a commit that they are not of."""

import subprocess
from pathlib import Path

import pytest

from obfuscatune.studies.reports import provenance
from obfuscatune.studies.reports.provenance import describe, describe_commit, digest_files


def git(directory: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(directory), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()  # noqa: S603


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a package in it, which the module is then taken to be in."""
    package = tmp_path / "src" / "package"
    (package / "studies" / "reports").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    monkeypatch.setattr(provenance, "__file__", str(package / "studies" / "reports" / "provenance.py"))
    return tmp_path


def test_the_commit_of_a_checkout(checkout: Path) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    assert describe_commit() == {"commit": commit, "dirty": False}
    (checkout / "results.csv").write_text("beside the package")
    assert describe_commit() == {"commit": commit, "dirty": False}
    (checkout / "src" / "package" / "__init__.py").write_text("changed")
    assert describe_commit() == {"commit": commit, "dirty": True}


def test_an_installation_below_another_checkout_has_no_commit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = checkout / ".venv" / "package" / "studies" / "reports"
    installed.mkdir(parents=True)
    (installed.parents[1] / "__init__.py").write_text("")
    monkeypatch.setattr(provenance, "__file__", str(installed / "provenance.py"))
    assert describe_commit() == {"commit": None, "dirty": None}


def test_without_git_there_is_no_commit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(checkout))
    assert describe_commit() == {"commit": None, "dirty": None}


def test_a_description_has_all_of_it() -> None:
    found = describe(["reproduce", "accuracy", "--output_dir", "a b"], seeds=(0, 1), device="cpu")
    names = {"commit", "dirty", "seeds", "device", "cpu", "cores", "torch", "transformers", "peft", "date", "command"}
    assert names <= found.keys()
    assert (found["seeds"], found["device"]) == ([0, 1], "cpu")
    assert found["command"] == "obfuscatune reproduce accuracy --output_dir 'a b'"


def test_a_digest_is_of_names_and_contents_in_any_order(tmp_path: Path) -> None:
    a, b, other = (tmp_path / name for name in ("a", "b", "c"))
    for path, text in ((a, "1"), (b, "2"), (other, "1")):
        path.write_text(text)
    digest = digest_files([a, b])
    assert digest == digest_files([b, a]) and len(digest) == 64
    assert digest != digest_files([other, b])
    a.write_text("3")
    assert digest != digest_files([a, b])
