"""Cells: each computed once, whatever ends the run, in one process or in several."""

import textwrap
from pathlib import Path
from typing import Any

import pytest

from obfuscatune.errors import ObfuscatuneError
from obfuscatune.studies.reproduce import cells as module
from obfuscatune.studies.reproduce.cells import Cell, CellCache, run_cells

CALLS: list[int] = []


def square(inputs: dict[str, Any], places: dict[str, Any]) -> dict[str, Any]:
    if inputs["x"] == places.get("fails_at"):
        raise ObfuscatuneError("no")
    CALLS.append(inputs["x"])
    return {"square": inputs["x"] ** 2}


def cube(inputs: dict[str, Any], places: dict[str, Any]) -> dict[str, Any]:
    return {"cube": inputs["x"] ** 3}


def cells(count: int, **places: Any) -> list[Cell]:
    return [Cell(label=str(x), compute=square, inputs={"x": x}, places=places) for x in range(count)]


@pytest.fixture(autouse=True)
def fresh() -> None:
    CALLS.clear()


def test_a_value_is_computed_once(tmp_path: Path) -> None:
    cache = CellCache(tmp_path)
    expected = [{"square": x * x} for x in range(4)]
    assert run_cells(cells(4), cache) == expected
    assert run_cells(cells(5, elsewhere="path"), cache) == [*expected, {"square": 16}]
    assert CALLS == [0, 1, 2, 3, 4], "a place decides nothing"
    assert len(cache.commits(cells(5))) == 1
    assert run_cells([], cache) == []


def test_all_that_decides_a_value_is_in_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    cell, same = (Cell(label=label, compute=square, inputs={"x": 1, "y": [2.5, None]}) for label in ("a", "b"))
    assert cell.key == same.key
    keys = {cell.key, cells(1)[0].key, Cell(label="a", compute=cube, inputs=cell.inputs).key}
    monkeypatch.setattr(module, "__version__", "9.9")
    keys.add(cell.key)
    for library in module.LIBRARIES:  # the report tells the versions of today: no value of others may be in it
        with monkeypatch.context() as patch:
            patch.setattr(module, "version", lambda name, newer=library: "9.9" if name == newer else "1.0")
            keys.add(cell.key)
    assert len(keys) == 4 + len(module.LIBRARIES)


def test_what_was_done_before_a_failure_is_kept(tmp_path: Path) -> None:
    cache = CellCache(tmp_path)
    with pytest.raises(ObfuscatuneError, match="no"):
        run_cells(cells(4, fails_at=2), cache)
    assert CALLS == [0, 1]
    run_cells(cells(4), cache)
    assert CALLS == [0, 1, 2, 3]


@pytest.mark.parametrize("content", ["", '{"inputs": {}, "val', "[]", '{"value": {}}', "\xff"])
def test_a_file_that_is_not_whole_is_computed_again(content: str, tmp_path: Path) -> None:
    cache, [cell] = CellCache(tmp_path), cells(1)
    path = tmp_path / f"{cell.key}.json"
    path.write_bytes(content.encode("latin-1"))
    assert cache.load(cell) is None and cache.commits([cell]) == []
    assert run_cells([cell], cache) == [{"square": 0}]
    assert [each.name for each in tmp_path.iterdir()] == [path.name], "something half written is left"


def test_a_value_that_cannot_be_kept_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ObfuscatuneError, match="cannot write the results"):
        run_cells(cells(1), CellCache(tmp_path / "file"))


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module that other processes can import."""
    source = """
        import os
        import time

        def process(inputs, places):
            return {"pid": os.getpid(), "x": inputs["x"]}

        def failing(inputs, places):
            # The first fails while the second runs.
            mine, other = (os.path.join(places["directory"], name) for name in (str(inputs["x"]), str(1 - inputs["x"])))
            open(mine, "w").close()
            while not os.path.exists(other):
                time.sleep(0.01)
            if inputs["x"] == 0:
                raise ValueError("no")
            time.sleep(0.2)
            return {"x": inputs["x"]}

        def killed(inputs, places):
            os.kill(os.getpid(), 9)
    """
    (tmp_path / "reproduce_probe.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    import reproduce_probe

    return reproduce_probe


def test_processes_of_their_own_give_the_same(probe: Any, tmp_path: Path) -> None:
    import os

    several = [Cell(label=str(x), compute=probe.process, inputs={"x": x}) for x in range(3)]
    values = run_cells(several, CellCache(tmp_path / "a"), workers=2, memory_gb=2.0)
    assert [value["x"] for value in values] == [0, 1, 2]
    assert os.getpid() not in {value["pid"] for value in values}
    too_large = run_cells(several, CellCache(tmp_path / "b"), workers=2, memory_gb=1.5)
    assert {value["pid"] for value in too_large} == {os.getpid()}, "two cells ran in the memory of one"


def test_what_ran_beside_a_failure_is_kept(probe: Any, tmp_path: Path) -> None:
    cache, places = CellCache(tmp_path / "cells"), {"directory": str(tmp_path)}
    several = [Cell(label=str(x), compute=probe.failing, inputs={"x": x}, places=places) for x in range(2)]
    with pytest.raises(ValueError, match="no"):
        run_cells(several, cache, workers=2, memory_gb=2.0)
    assert [cache.load(cell) for cell in several] == [None, {"x": 1}]


def test_a_killed_process_is_an_error_and_not_a_hang(probe: Any, tmp_path: Path) -> None:
    broken = [Cell(label=str(x), compute=probe.killed, inputs={"x": x}) for x in range(2)]
    with pytest.raises(ObfuscatuneError, match="the process of a cell was killed"):
        run_cells(broken, CellCache(tmp_path), workers=2, memory_gb=2.0)
