"""The checks of the site and of the declared versions find what they are for."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
GOOD = '<h1 id="top">a</h1><a href="#top">b</a><a href="https://example.org/">c</a><img src="data:image/png;base64,">'


@pytest.fixture
def check_site(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("check_site")


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ("", ""),
        ('<script src="https://cdn.example.org/x.js"></script>', "loads https://cdn.example.org/x.js from elsewhere"),
        ('<img src="//example.org/x.png">', "loads //example.org/x.png from elsewhere"),
        ('<link rel="stylesheet" href="https://fonts.example.org/css">', "from elsewhere"),
        ('<link rel="canonical" href="https://example.org/">', ""),
        ('<a href="gone.html">x</a>', "gone.html is not there"),
        ('<a href="../beside.txt">x</a>', "../beside.txt leaves the site"),
        ('<a href="#gone">x</a>', "#gone has no such anchor"),
    ],
)
def test_a_site(check_site: ModuleType, tmp_path: Path, more: str, fault: str) -> None:
    (tmp_path / "beside.txt").touch()  # there where the site is built, and not where it is read
    (site := tmp_path / "site").mkdir()
    (site / "index.html").write_text(GOOD + more)
    found = check_site.faults(site)
    assert len(found) == bool(fault) and fault in "".join(found)


def test_a_sheet_that_loads_a_font_and_an_empty_site(check_site: ModuleType, tmp_path: Path) -> None:
    assert check_site.faults(tmp_path) == [f"{tmp_path}: no pages"]
    (tmp_path / "index.html").write_text(GOOD)
    (tmp_path / "style.css").write_text("@font-face { src: url(https://fonts.example.org/x.woff2) }")
    assert check_site.faults(tmp_path) == ["style.css: loads from elsewhere"]


def test_lowest_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TOOLS)
    lowest = importlib.import_module("lowest").lowest
    project = '[project]\nname = "x"\ndependencies = ["a>=1.2,<3", "b[c]>=4,<5"]\n'
    extras = '[project.optional-dependencies]\nmore = ["x[less]", "d>=0.1.2,<1"]\nbad = ["e<1"]\n'
    assert lowest(project + extras) == ["a==1.2", "b==4"]
    assert lowest(project + extras, "more") == ["a==1.2", "b==4", "d==0.1.2"]
    with pytest.raises(ValueError, match="'e<1' is not NAME>=LOWEST,<ABOVE"):
        lowest(project + extras, "bad")
