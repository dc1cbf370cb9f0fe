"""A full disk at each point where one is written to: the job pauses, the enclave lives, and nothing is lost.

On a real file system of 2 MiB where one can be mounted (root, or unshare), and everywhere on one that only says so.
"""

import errno
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from obfuscatune.errors import StorageError
from obfuscatune.parties.sealed.writer import SealedWriter
from obfuscatune.service import patience
from obfuscatune.service import store as store_module
from obfuscatune.service.book import PAUSED
from obfuscatune.service.fine_tuning import Hooks
from obfuscatune.service.log import check
from obfuscatune.service.serve import Service

from .jobs import CLINIC, LAB, Enclave, open_enclave
from .test_requests import ask
from .test_serve import FakeRunner, Server, query_of

KEPT_FREE = 128 << 10


class Mounted:
    """A file system in memory; it is full when a file fills it."""

    def __init__(self, path: Path) -> None:
        self.path, self._filler = path, path / "somebody's file"

    def fill(self) -> None:
        with self._filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError as error:
                assert error.errno == errno.ENOSPC

    def free(self) -> None:
        self._filler.unlink()


class Told:
    """A directory whose disk says that it is full: to os.write, and to what writes sealed files."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.full = path, False
        self._refuse(monkeypatch, os, "write")
        self._refuse(monkeypatch, SealedWriter, "write")
        usage = shutil.disk_usage
        monkeypatch.setattr(
            store_module.shutil, "disk_usage", lambda p: usage(p)._replace(free=0) if self.full else usage(p)
        )

    def _refuse(self, monkeypatch: pytest.MonkeyPatch, where: Any, name: str) -> None:
        real = getattr(where, name)

        def write(*arguments: Any) -> Any:
            if self.full and not _is_pipe(arguments[0]):
                if where is os:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                raise StorageError("cannot write the sealed file", got=os.strerror(errno.ENOSPC))
            return real(*arguments)

        monkeypatch.setattr(where, name, write)

    def fill(self) -> None:
        self.full = True

    def free(self) -> None:
        self.full = False


def _is_pipe(handle: Any) -> bool:
    return isinstance(handle, int) and not os.path.isfile(f"/proc/self/fd/{handle}")


@pytest.fixture(params=["mounted", "told"])
def disk(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(store_module, "_KEPT_FREE", KEPT_FREE)
    monkeypatch.setattr(patience, "_FIRST_SECONDS", 0.01)
    monkeypatch.setattr(patience, "_MOST_SECONDS", 0.02)
    if request.param == "told":
        yield Told(tmp_path, monkeypatch)
        return
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:  # noqa: S603
        pytest.skip("cannot mount a file system here")
    try:
        yield Mounted(path)
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)  # noqa: S603, S607


@pytest.fixture
def enclave(disk: Any) -> Iterator[Enclave]:
    with open_enclave(disk.path) as opened:
        yield opened


class WritingRunner:
    """Writes a checkpoint and a result as a job does; ``before(point)`` is called at each."""

    def __init__(self, enclave: Enclave, before: Callable[[str], None]) -> None:
        self.enclave, self.before, self.kept, self.closed = enclave, before, None, False

    def run(self, signed: Any, checkpoint: str | None, hooks: Hooks) -> dict[str, str]:
        self.before("checkpoint")
        hooks.checkpoint(1, hooks.store(lambda: self.enclave.result("checkpoint")))
        second = hooks.store(lambda: self.enclave.result("checkpoint"))
        self.before("commit of a checkpoint")
        hooks.checkpoint(2, second)
        self.before("result")
        adapter = hooks.store(lambda: self.enclave.result("adapter"))
        self.before("end")
        return {"adapter": adapter}

    def answer(self, *_: Any) -> list[str]:
        return ["red"]

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("point", ["start", "checkpoint", "commit of a checkpoint", "result", "end"])
def test_a_full_disk_pauses_the_job(enclave: Enclave, disk: Any, point: str) -> None:
    job = enclave.submit(enclave.signed_job())

    def before(reached: str) -> None:
        if reached == point:
            disk.fill()

    serving = Service(enclave.book, WritingRunner(enclave, before), lambda _: Server(), max_file_bytes=1 << 20)  # type: ignore[arg-type, return-value]
    before("start")
    thread = threading.Thread(target=serving.work)
    thread.start()
    until(lambda: enclave.book.record(job).reason == PAUSED or point == "start")
    assert thread.is_alive() and enclave.book.record(job).status == ("queued" if point == "start" else "running")
    assert ask(enclave, LAB, "status", job=job)[0]["job"] == job  # it goes on serving what needs no room
    disk.free()
    until(lambda: enclave.book.record(job).status == "done")
    serving.stop()
    thread.join(20)
    assert not thread.is_alive() and enclave.book.record(job).reason == ""
    assert enclave.book.store.has(enclave.book.record(job).results["adapter"])
    head, lines = enclave.book.committed_log(0)
    check(lines, head, enclave.state.identity.public)
    assert list((enclave.directory / "store" / "own").iterdir()) == []
    with_checkpoints = [path.name for path in (enclave.directory / "store").glob("*.sealed")]
    assert len(with_checkpoints) == 4  # three inputs and the result: nothing is left over


def test_a_query_that_fails_does_not_wait_for_the_disk(enclave: Enclave, disk: Any) -> None:
    """It cannot be given back now: it stays counted, and asked again it costs nothing."""
    job = enclave.done_job()

    class Failing(FakeRunner):
        def answer(self, *_: Any) -> None:
            disk.fill()
            raise RuntimeError

    for runner, answered in ((Failing(lambda: None), False), (FakeRunner(lambda: None), True)):
        serving = Service(enclave.book, runner, lambda _: Server(), max_file_bytes=1 << 20)  # type: ignore[arg-type, return-value]
        query = query_of(job, "a")
        serving._answering.add(query)
        serving._answering.turn()
        assert query.wait(0) and (query.error is None) is answered
        assert enclave.book.record(job).queries == 1
        if not answered:
            disk.free()


def test_an_upload_goes_on_when_the_disk_has_room(enclave: Enclave, disk: Any) -> None:
    model, path = enclave.seal("model")
    signed = enclave.signed_job(model=model)
    job, size, content = enclave.submit(signed), path.stat().st_size, path.read_bytes()
    fields = {"job": job, "file": model, "size": size}
    ask(enclave, LAB, "upload", content[:100], **fields, offset=0)
    disk.fill()
    for _ in range(2):
        with pytest.raises(StorageError):
            ask(enclave, LAB, "upload", content[100:], **fields, offset=100)
    disk.free()
    assert ask(enclave, LAB, "resume_upload", **fields)[0] == {"offset": 100}
    ask(enclave, LAB, "upload", content[100:], **fields, offset=100)
    assert ask(enclave, LAB, "status", job=job)[0]["status"] == "queued"


def test_a_job_is_not_half_submitted(enclave: Enclave, disk: Any) -> None:
    signed = enclave.signed_job()
    disk.fill()
    with pytest.raises(StorageError):
        ask(enclave, CLINIC, "submit", signed.to_bytes())
    disk.free()
    assert ask(enclave, CLINIC, "submit", signed.to_bytes())[0]["status"] == "queued"


def test_an_enclave_that_is_stopped_while_it_waits_goes_on_later(disk: Any) -> None:
    with open_enclave(disk.path) as enclave:
        job = enclave.submit(enclave.signed_job())
        runner = WritingRunner(enclave, lambda point: disk.fill() if point == "result" else None)
        serving = Service(enclave.book, runner, lambda _: Server(), max_file_bytes=1 << 20)  # type: ignore[arg-type, return-value]
        thread = threading.Thread(target=serving.work)
        thread.start()
        until(lambda: enclave.book.record(job).reason == PAUSED)
        serving.stop()
        thread.join(20)
        assert not thread.is_alive()
        platform, checkpoint = enclave.platform, enclave.book.record(job).checkpoint
        disk.free()
    with open_enclave(disk.path, platform) as enclave:
        record = enclave.book.record(job)
        assert (record.status, record.checkpoint, record.reason) == ("queued", checkpoint, "") and checkpoint


def until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)
