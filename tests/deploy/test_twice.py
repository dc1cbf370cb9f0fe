"""``make image-twice``: what goes into the image is the same bytes when it is built again, and a difference is seen."""

import os
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture
def twice(scripts: dict[str, ModuleType]) -> ModuleType:
    return scripts["twice"]


def archive(path: Path, members: dict[str, bytes], *, year: int = 2026, mode: int = 0o644) -> Path:
    with zipfile.ZipFile(path, "w") as target:
        for name, data in members.items():
            item = zipfile.ZipInfo(name, (year, 1, 1, 0, 0, 0))
            item.external_attr = mode << 16
            target.writestr(item, data)
    return path


def test_a_difference_is_named(twice: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = {"a.py": b"1", "b.so": b"2"}
    first = archive(tmp_path / "first.whl", members)
    for other, changed in (
        ({"members": members}, []),
        ({"members": {**members, "b.so": b"3"}}, ["b.so"]),
        ({"members": {**members, "c": b""}}, ["c"]),
        ({"members": members, "year": 2027}, ["a.py", "b.so"]),
        ({"members": members, "mode": 0o600}, ["a.py", "b.so"]),
        ({"members": dict(reversed(members.items()))}, ["order or form of the zip"]),
    ):
        second = archive(tmp_path / "second.whl", **other)
        assert twice.differences(first, second) == changed
    (tmp_path / "initrd").write_bytes(b"1")
    (tmp_path / "second").write_bytes(b"2")
    assert not twice.compare(iter([(tmp_path / "initrd", tmp_path / "second"), (first, first)]))
    assert capsys.readouterr().out.splitlines()[0].startswith("DIFFER  ")


def test_without_mkosi_no_image_is_claimed(
    twice: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(twice.shutil, "which", lambda name: None)
    assert twice.main(["--image"]) == 2
    assert "the image was not built" in capsys.readouterr().err


def test_paths_hold_in_the_folders_of_the_builds(
    twice: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(twice.shutil, "which", lambda name: name)
    monkeypatch.setattr(twice, "copy_tree", lambda target: target)
    monkeypatch.setattr(twice, "build_wheel", lambda *each: archive(tmp_path / "a.whl", {}))
    seen = []
    monkeypatch.setattr(
        twice, "_run", lambda *each: seen.append([twice.os.environ.get(n) for n in ("WHEELS", "OVMF", "PYTHON")])
    )
    monkeypatch.setattr(twice, "compare", lambda pairs: True)
    for python, expected in (("bin/python", str(tmp_path / "bin/python")), ("python3", "python3")):
        for name, value in (("WHEELS", "wheels"), ("OVMF", "OVMF.fd"), ("PYTHON", python)):
            monkeypatch.setenv(name, value)
        assert twice.main(["--image"]) == 0
        assert seen.pop() == seen.pop() == [str(tmp_path / "wheels"), str(tmp_path / "OVMF.fd"), expected]


@pytest.mark.slow
def test_the_wheel_is_the_same_when_it_is_built_again() -> None:
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-B", str(DEPLOY / "twice.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.startswith("same  ") and done.stdout.rstrip().endswith(".whl")


@pytest.mark.slow
def test_a_wheel_has_the_compiled_part_of_this_build_alone(twice: ModuleType, tmp_path: Path) -> None:
    tree = twice.copy_tree(tmp_path)
    own = f"kernel{sysconfig.get_config_var('EXT_SUFFIX')}"
    folder = "obfuscatune/protocol/c"
    built = tree / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / folder
    built.mkdir(parents=True)
    # Of `make setup`, of another Python, and of an earlier build: newer than the sources, as one copied later is.
    for path in (tree / "src" / folder / own, tree / "src" / folder / "kernel.cpython-310-other.so", built / own):
        path.write_bytes(b"not compiled here")
        os.utime(path, (time.time() + 3600,) * 2)
    with zipfile.ZipFile(twice.build_wheel(tree, twice.SURROUNDINGS[0])) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".so"))
        assert (name, archive.read(name)[:4]) == (f"{folder}/{own}", b"\x7fELF")


def test_a_tree_without_its_history_is_one_message(
    twice: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(twice, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert twice.main([]) == 2
    assert "a build failed: git ls-files -z ... with 128" in capfd.readouterr().err
