"""Pages say what the code says: the catalogue of errors, the README's snippet and the demo's output in it."""

import ast
import inspect
import re
import tomllib
from pathlib import Path

import pytest
import yaml

import obfuscatune
from obfuscatune import errors

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CATALOGUE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")


def strings_of_the_package() -> str:
    """All string constants in the code, f-strings' constant parts included, one a line."""
    found: list[str] = []
    for path in (ROOT / "src").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return "\n".join(found)


def test_the_catalogue_has_every_error_under_its_exit_code() -> None:
    classes = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]
    misuse, failures = CATALOGUE.split("## Misuse")[1].split("## Failures")
    for kind in classes:
        if kind is not errors.ObfuscatuneError:
            section = misuse if issubclass(kind, errors.UsageError) else failures
            assert f"::: {kind.__module__}.{kind.__name__}\n" in section, kind.__name__


def test_the_catalogue_quotes_messages_of_the_package() -> None:
    quoted = re.findall(r"^\| `([^`]+)` \|", CATALOGUE, re.MULTILINE)
    said = strings_of_the_package()
    assert len(quoted) > 20
    assert [message for message in quoted if message not in said] == []
    assert "a message that nobody raises" not in said


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120


def test_links_of_the_readme_lead_somewhere() -> None:
    targets = [link for link in re.findall(r"\]\(([^)#]+)", README) if not link.startswith("https://")]
    assert len(targets) > 15
    assert [target for target in targets if not (ROOT / target).exists()] == []


@pytest.mark.parametrize("page", ["README.md", "docs/for/engineer.md"])
def test_the_snippets_import_what_they_use(page: str) -> None:
    snippet = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)[0]
    tree = ast.parse(snippet)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    bound = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {alias.asname or alias.name for alias in node.names}
    assert used - bound == {"rows", "print"}


def test_every_file_names_the_same_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert project["version"] == obfuscatune.__version__ == citation["version"]
    assert f" {project['version']}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_files_that_the_pages_name_are_there() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *(ROOT / "docs").rglob("*.md")]
    roots = (ROOT, ROOT / "src" / "obfuscatune")
    folders = "|".join(re.escape(path.name) for root in roots for path in sorted(root.iterdir()) if path.is_dir())
    named = re.compile(rf"`((?:{folders})/[\w./-]*\w/?)(?:::\w+)?`")
    found = {(page, name) for page in pages for name in named.findall(page.read_text(encoding="utf-8"))}
    assert len(found) > 60
    made = {"results", "build", "dist"}  # by commands
    missing = [
        f"{page.relative_to(ROOT)}: {name}"
        for page, name in sorted(found)
        if not any((root / name).exists() for root in roots) and name.split("/")[0] not in made and "NAME" not in name
    ]
    assert missing == []
