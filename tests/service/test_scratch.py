"""Directories in memory: on a tmpfs or not at all, and gone afterwards."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from obfuscatune.errors import UsageError
from obfuscatune.service import scratch
from obfuscatune.service.scratch import ram_directory

MEMORY = Path("/dev/shm")  # noqa: S108
PREFIX = f"scratch-test-{os.getpid()}"

pytestmark = [
    pytest.mark.skipif(not os.access(MEMORY, os.W_OK), reason="no /dev/shm to write to"),
    pytest.mark.filterwarnings("ignore:swap is on"),  # on the machine of whoever runs the tests
]


def left() -> list[Path]:
    return list(MEMORY.glob(f"{PREFIX}.*"))


def test_a_directory_is_private_and_goes_with_all_that_is_in_it() -> None:
    with ram_directory(PREFIX) as path:
        assert path.parent == MEMORY and path.stat().st_mode & 0o777 == 0o700
        (path / "deep").mkdir()
        (path / "deep" / "model.safetensors").write_bytes(b"plain")
        assert left() == [path]
    assert left() == []


def test_it_goes_after_an_error_too() -> None:
    with pytest.raises(KeyboardInterrupt), ram_directory(PREFIX) as path:
        (path / "a").touch()
        raise KeyboardInterrupt
    assert left() == []


def test_two_at_once_do_not_disturb_each_other() -> None:
    with ram_directory(PREFIX) as one:
        with ram_directory(PREFIX) as two:
            assert one != two
        assert one.is_dir()


def test_a_disk_is_refused(tmp_path: Path) -> None:
    if os.stat(tmp_path).st_dev == os.stat(MEMORY).st_dev:
        pytest.skip("the temporary directory is in memory here")
    with pytest.raises(UsageError) as caught, ram_directory(PREFIX, tmp_path):
        pass
    assert caught.value.what in ("directory is not in memory", "cannot tell whether a directory is in memory")
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_a_disk_is_refused(tmp_path: Path) -> None:
    if os.stat(tmp_path).st_dev == os.stat(MEMORY).st_dev:
        pytest.skip("the temporary directory is in memory here")
    with ram_directory(PREFIX) as path:
        (path / "link").symlink_to(tmp_path)
        with pytest.raises(UsageError), ram_directory(PREFIX, path / "link"):
            pass
    assert tmp_path.is_dir()


@pytest.mark.parametrize("kind", ["ext4", "overlay", "nfs", "fuse.tmpfs", "9p"])
def test_only_tmpfs_and_ramfs_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    def table(kind: str) -> None:
        write_proc(tmp_path, f"1 0 {device()} / /dev/shm rw shared:2 - {kind} tmpfs rw")

    monkeypatch.setattr(scratch, "PROC", tmp_path)
    table(kind)
    with pytest.raises(UsageError, match="not in memory"), ram_directory(PREFIX):
        pass
    table("ramfs")  # the control
    with ram_directory(PREFIX):
        pass


def test_without_a_table_of_mounts_nothing_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "PROC", tmp_path)
    with pytest.raises(UsageError, match="cannot tell"), ram_directory(PREFIX):
        pass


def test_swap_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "PROC", tmp_path)
    (tmp_path / "swaps").write_text("Filename Type Size Used Priority\n/dev/sda2 partition 1 0 -2\n")
    write_proc(tmp_path, f"1 0 {device()} / /dev/shm rw - tmpfs tmpfs rw,size=1k")
    with pytest.warns(UserWarning, match="swap is on"), ram_directory(PREFIX):
        pass
    write_proc(tmp_path, f"1 0 {device()} / /dev/shm rw - tmpfs tmpfs rw,noswap")
    with ram_directory(PREFIX):
        pass


def test_under_gramine_only_tmp_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "PROC", tmp_path)
    monkeypatch.setattr(scratch, "GRAMINE", tmp_path)
    with pytest.raises(UsageError, match="only /tmp"), ram_directory(PREFIX, MEMORY):
        pass
    with ram_directory(PREFIX) as path:
        assert path.parent == Path("/tmp")  # noqa: S108
    assert not path.exists()


@pytest.mark.parametrize("prefix", ["", "../x", "a/b", "A", "x" * 32, "a.b", "*"])
def test_a_prefix_is_a_name(prefix: str) -> None:
    with pytest.raises(UsageError, match="prefix"), ram_directory(prefix):
        pass


CHILD = """
import os, signal, sys
from obfuscatune.service.scratch import ram_directory
with ram_directory(sys.argv[1]) as path:
    (path / "plain").write_text("plain")
    print(path, flush=True)
    if sys.argv[2] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()
"""


def child(end: str) -> "subprocess.Popen[str]":
    arguments = [sys.executable, "-W", "ignore", "-c", CHILD, PREFIX, end]
    return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603


def test_what_a_killed_process_left_goes_at_the_kill_and_a_living_one_keeps_its_own() -> None:
    with child("die") as dead, child("wait") as living:
        assert dead.stdout is not None and living.stdout is not None and living.stdin is not None
        theirs = Path(living.stdout.readline().strip())
        leftover = Path(dead.stdout.readline().strip())
        dead.wait()
        deadline = time.monotonic() + 20
        while leftover.exists():
            assert time.monotonic() < deadline
            threading.Event().wait(0.01)
        assert left() == [theirs] and (theirs / "plain").exists()
        living.stdin.close()
    assert living.returncode == 0 and left() == []


def test_what_is_left_without_a_guard_goes_at_the_next_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with child("wait") as living:
        assert living.stdout is not None and living.stdin is not None
        theirs = Path(living.stdout.readline().strip())
        killed = theirs.with_name(f"{PREFIX}.{os.getpid()}.1.leftover")
        (killed / "deep").mkdir(parents=True)
        monkeypatch.setattr(scratch.subprocess, "Popen", no_shell)
        with ram_directory(PREFIX) as path:
            assert set(left()) == {theirs, path}
        living.stdin.close()
    assert left() == []


def no_shell(*_: object, **__: object) -> None:
    raise FileNotFoundError


def test_a_process_of_the_same_number_that_started_later_is_another_one() -> None:
    reused = MEMORY / f"{PREFIX}.{os.getpid()}.1.abcd"
    reused.mkdir()
    with ram_directory(PREFIX):
        assert not reused.exists()


def device() -> str:
    number = MEMORY.stat().st_dev
    return f"{os.major(number)}:{os.minor(number)}"


def write_proc(root: Path, line: str) -> None:
    (root / "self").mkdir(exist_ok=True)
    (root / "self" / "mountinfo").write_text(f"9 0 254:77 / / rw - ext4 /dev/vda rw\n{line}\n")
