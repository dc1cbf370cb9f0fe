"""The sealed state: what it keeps, that only the last one opens, and that a kill at any point leaves one that opens."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obfuscatune import durable
from obfuscatune.errors import FormatError, ObfuscatuneError, RollbackError, SealError, UsageError
from obfuscatune.parties.attestation.platform import open_platform
from obfuscatune.service.state import State

from .platforms import Counter, FileCounter, MemoryPlatform, new_platform

JOB = "ab" * 32


class KilledError(BaseException):
    """Stands for the end of the process: nothing in the package catches it."""


def last_commit(directory: Path, platform: MemoryPlatform, jobs: dict[str, Any]) -> bytes:
    with State.open(directory, platform) as state:
        state.jobs = jobs
        state.commit()
    return (directory / "state.sealed").read_bytes()


def test_a_state_comes_back_whole(tmp_path: Path) -> None:
    platform = new_platform()
    with State.open(tmp_path, platform) as state:
        identity = state.identity.public
        state.jobs[JOB] = {"status": "running", "step": 7, "parts": [1.5, None, True]}
        state.log_head, state.log_length = "cd" * 32, 3
        state.commit()
    for _ in range(2):
        with State.open(tmp_path, platform) as state:
            assert state.identity.public == identity and state.identity.public.name == "enclave"
            assert state.jobs == {JOB: {"status": "running", "step": 7, "parts": [1.5, None, True]}}
            assert (state.log_head, state.log_length, state.in_memory) == ("cd" * 32, 3, False)


def test_the_simulated_hardware_keeps_a_state(tmp_path: Path) -> None:
    with State.open(tmp_path / "state", open_platform(f"simulation:{tmp_path / 'hardware'}")) as state:
        identity = state.identity.public
    old = (tmp_path / "state" / "state.sealed").read_bytes()
    with State.open(tmp_path / "state", open_platform(f"simulation:{tmp_path / 'hardware'}")) as state:
        assert state.identity.public == identity
    (tmp_path / "state" / "state.sealed").write_bytes(old)
    with pytest.raises(RollbackError):
        State.open(tmp_path / "state", open_platform(f"simulation:{tmp_path / 'hardware'}"))
    with pytest.raises(SealError):
        State.open(tmp_path / "state", open_platform(f"simulation:{tmp_path / 'other hardware'}"))


def test_the_file_is_private_and_shows_nothing(tmp_path: Path) -> None:
    data = last_commit(tmp_path / "new", new_platform(), {JOB: {"canary": "CANARY-IN-A-JOB"}})
    assert b"CANARY" not in data and JOB.encode() not in data
    assert (tmp_path / "new" / "state.sealed").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


def test_a_repr_shows_no_job_and_no_key(tmp_path: Path) -> None:
    with State.open(tmp_path, new_platform()) as state:
        state.jobs[JOB] = {"canary": "CANARY"}
        assert repr(state) == "State(version 2, 1 jobs)"


def test_an_old_copy_is_refused_and_the_last_one_opens(tmp_path: Path) -> None:
    platform, file = new_platform(), tmp_path / "state.sealed"
    old = last_commit(tmp_path, platform, {JOB: {"used": 0}})
    new = last_commit(tmp_path, platform, {JOB: {"used": 1}})
    file.write_bytes(old)
    with pytest.raises(RollbackError, match="older") as caught:
        State.open(tmp_path, platform)
    assert "old copy" in str(caught.value)
    file.write_bytes(new)
    with State.open(tmp_path, platform) as state:
        assert state.jobs == {JOB: {"used": 1}}


def test_a_counter_that_was_put_back_is_refused(tmp_path: Path) -> None:
    platform = new_platform()
    last_commit(tmp_path, platform, {})
    platform.counter.count -= 2
    with pytest.raises(RollbackError, match="newer"):
        State.open(tmp_path, platform)


def test_a_deleted_state_is_another_enclave_and_cannot_come_back(tmp_path: Path) -> None:
    platform = new_platform()
    last_commit(tmp_path, platform, {JOB: {"used": 1}})
    with State.open(tmp_path, platform) as state:
        before = state.identity.public
    kept = (tmp_path / "state.sealed").read_bytes()
    (tmp_path / "state.sealed").unlink()
    with State.open(tmp_path, platform, new=True) as state:
        assert state.identity.public != before  # so no job of before is for it, used up or not
        assert state.jobs == {}
    (tmp_path / "state.sealed").write_bytes(kept)
    with pytest.raises(RollbackError, match="older"):
        State.open(tmp_path, platform)


def test_a_disk_that_is_not_mounted_costs_no_state(tmp_path: Path) -> None:
    """An empty directory is no reason to begin anew: the first commit would make the state of before an old one."""
    platform = new_platform()
    last_commit(tmp_path / "state", platform, {JOB: {"used": 1}})
    count = platform.counter.read()
    for _ in range(2):
        with pytest.raises(UsageError, match="state is missing") as caught:
            State.open(tmp_path / "elsewhere", platform)
        assert "--new" in str(caught.value) and not list((tmp_path / "elsewhere").glob("state.sealed*"))
    assert platform.counter.read() == count
    with State.open(tmp_path / "state", platform) as state:
        assert state.jobs == {JOB: {"used": 1}}


def test_a_first_start_on_a_counter_that_begins_above_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    platform = new_platform()
    platform.counter.count = 41  # a TPM begins a new counter where any before it ended
    monkeypatch.setattr(platform.counter, "used", lambda: False)
    with State.open(tmp_path, platform) as state:
        identity = state.identity.public
    with State.open(tmp_path, platform) as state:
        assert state.identity.public == identity


def test_another_key_is_refused(tmp_path: Path) -> None:
    platform = new_platform()
    last_commit(tmp_path, platform, {})
    platform.key = b"k" * 32
    with pytest.raises(SealError, match="does not open"):
        State.open(tmp_path, platform)


def test_a_version_on_the_outside_that_was_changed_is_refused(tmp_path: Path) -> None:
    platform = new_platform()
    old = bytearray(last_commit(tmp_path, platform, {}))
    last_commit(tmp_path, platform, {})
    at = len(b"obfuscatune enclave state 3\0")
    old[at : at + 8] = platform.counter.count.to_bytes(8, "big")
    (tmp_path / "state.sealed").write_bytes(old)
    with pytest.raises(SealError):
        State.open(tmp_path, platform)


def test_a_thousand_corruptions_are_refused(tmp_path: Path) -> None:
    platform = new_platform()
    good = last_commit(tmp_path, platform, {JOB: {"canary": "CANARY"}})
    generator = random.Random(3)
    for _ in range(1000):
        bad = corrupt(good, generator)
        (tmp_path / "state.sealed").write_bytes(bad)
        with pytest.raises((SealError, RollbackError)) as caught:
            State.open(tmp_path, platform)
        assert "CANARY" not in str(caught.value)
    (tmp_path / "state.sealed").write_bytes(good)
    State.open(tmp_path, platform).close()


def corrupt(good: bytes, generator: random.Random) -> bytes:
    data, at = bytearray(good), generator.randrange(len(good))
    match generator.randrange(5):
        case 0:
            data[at] ^= 1 << generator.randrange(8)
        case 1:
            del data[at:]
        case 2:
            data[at:at] = generator.randbytes(generator.randrange(1, 9))
        case 3:
            del data[at : at + generator.randrange(1, 9)]
        case 4:
            data[at : at + 9] = generator.randbytes(len(data[at : at + 9]))
    assert data != good
    return bytes(data)


@settings(max_examples=100)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_refused(data: bytes, magic: bool) -> None:
    platform = MemoryPlatform(counter=Counter(1))
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "state.sealed").write_bytes((b"obfuscatune enclave state 3\0" if magic else b"") + data)
        with pytest.raises(SealError):
            State.open(Path(name), platform)


def test_a_file_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "state.sealed").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(UsageError, match="too long"):
        State.open(tmp_path, new_platform())


def test_without_a_sealing_key_nothing_is_written(tmp_path: Path) -> None:
    platform = MemoryPlatform(key=None, counter=Counter(7))
    with pytest.warns(UserWarning, match="no sealing key"), State.open(tmp_path, platform) as state:
        state.jobs[JOB] = {}
        state.commit()
        assert state.in_memory and state.identity.public.name == "enclave"
    assert [path.name for path in tmp_path.iterdir()] == ["state.lock"] and platform.counter.count == 7


def test_without_a_sealing_key_a_state_that_is_there_is_not_passed_over(tmp_path: Path) -> None:
    platform = new_platform()
    last_commit(tmp_path, platform, {})
    platform.key = None
    with pytest.raises(UsageError, match="cannot be opened here"):
        State.open(tmp_path, platform)


def test_without_a_counter_a_rollback_is_not_seen_and_that_is_said(tmp_path: Path) -> None:
    platform = MemoryPlatform()
    with pytest.warns(UserWarning, match="no monotonic counter"):
        old = last_commit(tmp_path, platform, {JOB: {"used": 0}})
    with pytest.warns(UserWarning, match="no monotonic counter"):
        last_commit(tmp_path, platform, {JOB: {"used": 1}})
    (tmp_path / "state.sealed").write_bytes(old)
    with pytest.warns(UserWarning, match="only the parties"), State.open(tmp_path, platform) as state:
        assert state.jobs == {JOB: {"used": 0}}


def test_a_second_enclave_on_the_directory_is_refused(tmp_path: Path) -> None:
    platform = new_platform()
    with State.open(tmp_path, platform) as state:
        with pytest.raises(UsageError, match="runs on this directory already"):
            State.open(tmp_path, platform)
        state.commit()
    State.open(tmp_path, platform).close()


def test_a_state_that_fails_to_open_leaves_the_directory_free(tmp_path: Path) -> None:
    (tmp_path / "state.sealed").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(SealError):
            State.open(tmp_path, new_platform())


def test_a_counter_that_somebody_else_moves_stops_the_commits(tmp_path: Path) -> None:
    platform = new_platform()
    with State.open(tmp_path, platform) as state:
        platform.counter.increment()
        with pytest.raises(RollbackError, match="moved by somebody else"):
            state.commit()


def test_a_job_that_is_not_json_leaves_the_last_state(tmp_path: Path) -> None:
    platform = new_platform()
    with State.open(tmp_path, platform) as state:
        state.jobs[JOB] = {"path": Path()}
        with pytest.raises(FormatError):
            state.commit()
        state.jobs[JOB] = {"path": "x"}
        state.commit()
    with State.open(tmp_path, platform) as state:
        assert state.jobs == {JOB: {"path": "x"}}


def test_threads_commit_in_turn(tmp_path: Path) -> None:
    platform = new_platform()
    with State.open(tmp_path, platform) as state:

        def work(number: int) -> None:
            for step in range(5):
                with state.lock:
                    state.jobs[str(number)] = {"step": step}
                state.commit()

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert platform.counter.count == 2 + 4 * 5
    with State.open(tmp_path, platform) as state:
        assert state.jobs == {str(number): {"step": 4} for number in range(4)}


# Kills. A commit is a sequence of operations of the system: each prefix of it is a crash.


class Machine:
    """A disk and a counter, and an adversary who keeps every file that was ever there and kills at will."""

    def __init__(self, directory: Path, patch: pytest.MonkeyPatch) -> None:
        self.directory, self.platform = directory, new_platform()
        self.files: list[bytes] = []
        self.left: int | None = None
        for name in ("write", "fsync", "replace"):
            patch.setattr(durable.os, name, self._counted(getattr(os, name)))
        self.platform.counter.increment = self._counted(self.platform.counter.increment)  # type: ignore[method-assign]

    def _counted(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            if self.left is not None:
                if self.left == 0:
                    raise KilledError
                self.left -= 1
            result = operation(*arguments)
            self._keep()
            return result

        return run

    def _keep(self) -> None:
        for name in ("state.sealed", "state.new"):
            path = self.directory / name
            if path.exists() and (data := path.read_bytes()) not in self.files:
                self.files.append(data)

    def run(self, commits: int, kill_at: int | None, offered: int | None) -> tuple[list[int], list[int] | None]:
        """Start with a file of the adversary's choice; return what it opened with, and what was last committed."""
        count = self.platform.counter.read()
        fitting = [data for data in self.files if version_of(data) - count in (0, 1)]  # the others are refused anyway
        if offered is not None and fitting:
            (self.directory / "state.sealed").write_bytes(fitting[offered % len(fitting)])
        self.left, seen, done = None if kill_at is None else kill_at, [], None
        state = None
        try:
            state = State.open(self.directory, self.platform)
            done = seen = list(state.jobs.get("history", []))
            for _ in range(commits):
                history = [*done, len(self.files) * 1000 + len(done)]
                state.jobs["history"] = history
                state.commit()
                done = history
        except (KilledError, RollbackError, SealError):
            pass
        finally:
            self.left = None
            if state is not None:
                state.close()
        return seen, done


def adversary(machine: Machine, choices: list[tuple[int, int | None, int | None]]) -> bool:
    """Return whether any start forgot what an earlier commit had confirmed."""
    confirmed: list[int] = []
    for commits, kill_at, offered in choices:
        seen, done = machine.run(commits, kill_at, offered)
        if done is None:
            continue
        if seen[: len(confirmed)] != confirmed:
            return True
        confirmed = done
    return False


# 4 and 9 are the ends of the opening's two commits, 14 that of the next: between rename and counter.
kills = st.none() | st.sampled_from([4, 9, 14]) | st.integers(0, 18)
starts = st.tuples(st.integers(0, 2), kills, st.none() | st.integers(0, 3))


@settings(max_examples=200)
@given(st.lists(starts, min_size=3, max_size=8))
def test_no_adversary_undoes_a_commit(choices: list[tuple[int, int | None, int | None]]) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        assert not adversary(Machine(Path(name), patch), choices)


def kept_file_opens(machine: Machine, operations_at_the_opening: int) -> bool:
    """Kill a commit between rename and counter and keep its file; offer it after another commit of that number.

    A commit has five operations: write, fsync, replace, fsync of the directory, counter.
    """
    machine.run(1, operations_at_the_opening + 4, None)
    file = machine.directory / "state.sealed"
    kept, count = file.read_bytes(), machine.platform.counter.read()
    assert version_of(kept) == count + 1
    file.write_bytes(next(data for data in machine.files if version_of(data) == count))
    _, confirmed = machine.run(1, None, None)
    assert confirmed
    file.write_bytes(kept)
    seen, done = machine.run(0, None, None)
    return done is not None and seen != confirmed


def version_of(data: bytes) -> int:
    at = len(b"obfuscatune enclave state 3\0")
    return int.from_bytes(data[at : at + 8], "big") if len(data) > at + 8 else 0


@pytest.mark.parametrize("single", [False, True], ids=["as it is", "control: one write each"])
def test_a_file_kept_from_a_killed_commit_is_of_no_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, single: bool
) -> None:
    machine = Machine(tmp_path, monkeypatch)
    machine.run(1, None, None)
    if single:  # the usual scheme: no commit at the opening, each made once
        begin, write = State._begin, State._write

        def bare_begin(state: State, new: bool) -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(State, "commit", lambda state: None)
                begin(state, new)

        monkeypatch.setattr(State, "_begin", bare_begin)
        monkeypatch.setattr(State, "commit", lambda state: write(state, state._cipher))  # type: ignore[arg-type]
    assert kept_file_opens(machine, 0 if single else 10) == single


@pytest.mark.parametrize("times", [2, 1], ids=["as it is", "control: one commit at the opening"])
def test_one_commit_at_the_opening_would_not_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    machine = Machine(tmp_path, monkeypatch)
    file = tmp_path / "state.sealed"
    if times == 1:
        original = State._begin

        def begin(state: State, new: bool) -> None:
            state._unconfirmed = False
            original(state, new)

        monkeypatch.setattr(State, "_begin", begin)
    machine.run(1, None, None)
    opening = 5 * times
    machine.run(1, opening + 4, None)
    one, count = file.read_bytes(), machine.platform.counter.read()
    file.write_bytes(next(data for data in machine.files if version_of(data) == count))
    machine.run(1, opening + (4 if times == 1 else -1), None)  # kept: the file after an opening, or half way in it
    two = file.read_bytes()
    file.write_bytes(one)
    _, confirmed = machine.run(0, None, None)
    file.write_bytes(two)
    seen, done = machine.run(0, None, None)
    undone = confirmed is not None and done is not None and seen[: len(confirmed)] != confirmed
    assert undone == (times == 1)


@pytest.mark.parametrize("kill_at", range(26))
def test_every_prefix_of_the_operations_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int) -> None:
    machine = Machine(tmp_path, monkeypatch)
    _, first = machine.run(3, kill_at, None)
    seen, done = machine.run(1, None, None)
    assert done is not None and len(done) == len(seen) + 1
    assert seen[: len(first or [])] == (first or [])


def test_a_commit_that_failed_can_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    platform = new_platform()
    with State.open(tmp_path, platform) as state:
        state.jobs["a"] = {}
        with monkeypatch.context() as patch:
            patch.setattr(durable.os, "replace", _full)
            with pytest.raises(ObfuscatuneError, match="cannot write the enclave's state"):
                state.commit()
        count = platform.counter.count
        state.commit()
        assert platform.counter.count == count + 2  # past the file that the disk may have kept
    with State.open(tmp_path, platform) as state:
        assert state.jobs == {"a": {}}


def _full(*_: object) -> None:
    raise OSError(28, "No space left on device")


CHILD = """
import itertools, os, signal, sys
from pathlib import Path
from obfuscatune import durable
from obfuscatune.service.state import State
sys.path.insert(0, sys.argv[1])
from platforms import FileCounter, MemoryPlatform
directory, kill_at, done = Path(sys.argv[2]), int(sys.argv[3]), itertools.count()

def counted(operation):
    def run(*arguments):
        if next(done) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return operation(*arguments)
    return run

platform = MemoryPlatform(counter=FileCounter(directory / "counter"))
with State.open(directory, platform) as state:
    for name in ("write", "fsync", "replace"):
        setattr(durable.os, name, counted(getattr(os, name)))
    platform.counter.increment = counted(platform.counter.increment)
    for step in itertools.count(state.jobs["job"]["step"] + 1):
        state.jobs["job"] = {"step": step}
        state.commit()
        print(step, flush=True)
"""


@pytest.mark.parametrize("kill_at", [5, 6, 8, 9, 10])
def test_a_process_that_is_killed_goes_on(tmp_path: Path, kill_at: int) -> None:
    platform = MemoryPlatform(counter=FileCounter(tmp_path / "counter"))
    last_commit(tmp_path, platform, {"job": {"step": 0}})
    child = subprocess.run(  # noqa: S603
        [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(tmp_path), str(kill_at)],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert child.returncode == -signal.SIGKILL
    confirmed = int(child.stdout.split()[-1])
    with State.open(tmp_path, platform) as state:
        assert state.jobs["job"]["step"] in (confirmed, confirmed + 1)
    shutil.copy(tmp_path / "state.sealed", tmp_path / "kept")
    last_commit(tmp_path, platform, {})
    shutil.copy(tmp_path / "kept", tmp_path / "state.sealed")
    with pytest.raises(RollbackError):
        State.open(tmp_path, platform)
