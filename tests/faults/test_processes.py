"""Real processes that are killed: the other side notices at once, says what happened, and nothing is left behind."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import torch

import obfuscatune
from obfuscatune.errors import UsageError, WorkerFault
from obfuscatune.protocol.connection import Connection

from .workers import IDS, generate, loss_of, new_model

PATIENCE = 60  # seconds; nothing here takes more than a few


def kill_when_sent(monkeypatch: pytest.MonkeyPatch, protected: Any, op: str, number: int) -> None:
    """Kill the worker between the ``number``-th request of an operation and its reply."""
    pid, send, seen = protected.session.process.pid, Connection.send, []

    def sending(self: Connection, fields: Any, tensors: Any = None, **options: Any) -> int:
        seen.append(fields["op"])
        if (fields["op"], seen.count(op)) != (op, number):
            return send(self, fields, tensors or {}, **options)
        os.kill(pid, signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)  # it has stopped, so it cannot reply
        sent = send(self, fields, tensors or {}, **options)
        os.kill(pid, signal.SIGKILL)
        return sent

    monkeypatch.setattr(Connection, "send", sending)


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


WORK: dict[str, tuple[Callable[[Any], Any], str, int, str]] = {
    "forward": (loss_of, "forward", 3, "transformer.h.1.attn"),
    "backward": (lambda model: loss_of(model).backward(), "backward", 1, "transformer.h.1.mlp"),
    "generation": (generate, "forward", 6, "transformer.h.0.mlp"),
}


@pytest.mark.parametrize("work", WORK)
def test_a_killed_worker(work: str, monkeypatch: pytest.MonkeyPatch) -> None:
    do, op, number, layer = WORK[work]
    descriptors = len(os.listdir("/proc/self/fd"))
    with obfuscatune.protect(new_model(), threads=1, timeout=PATIENCE) as protected:
        pid = protected.session.process.pid
        kill_when_sent(monkeypatch, protected, op, number)
        with pytest.raises(WorkerFault) as caught:
            do(protected.model)
        fault = caught.value
        where = f"worker spawned process {pid}, layer {layer}, call {fault.call}"
        assert str(fault).splitlines() == [
            f"the worker is gone: got killed by signal 9 (at {where})",
            "hint: start the worker again if it is gone, and resume from the last checkpoint",
        ]
        assert fault.call == protected.session._last_id
        assert is_gone(pid)
        with pytest.raises(UsageError, match=r"ended by an earlier fault \(the worker is gone\)"):
            do(protected.model)
    assert len(os.listdir("/proc/self/fd")) == descriptors


ENCLAVE = """
import sys, obfuscatune
sys.path.insert(0, sys.argv[1])
from faults.workers import new_model
protected = obfuscatune.protect(new_model(), threads=1)
print(protected.session.process.pid, flush=True)
sys.stdin.read()
"""


def test_a_killed_enclave_takes_its_worker_along() -> None:
    command = [sys.executable, "-c", ENCLAVE, str(Path(__file__).parents[1])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as enclave:  # noqa: S603
        assert enclave.stdout is not None
        worker = os.pidfd_open(int(enclave.stdout.readline()))
        try:
            assert not select.select([worker], [], [], 0)[0], "the worker runs"
            enclave.kill()
            assert select.select([worker], [], [], PATIENCE)[0], "the worker outlives the enclave"
        finally:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(worker, signal.SIGKILL)
            os.close(worker)


def test_a_child_of_the_enclave_leaves_its_session_alone() -> None:
    """A process that is forked has a copy of all, and ends it when it leaves."""
    model = new_model()
    expected = loss_of(model)
    with obfuscatune.protect(model, worker="spawn", threads=1) as protected:
        child = os.fork()
        if child == 0:
            try:
                with contextlib.suppress(UsageError):  # no product: OpenMP's threads are not in the child
                    protected.session.request("stats", "-", {}, {}, None)
                    os._exit(2)
                protected.close()
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        torch.testing.assert_close(loss_of(protected.model), expected)


def test_a_closed_session_leaves_no_process() -> None:
    with obfuscatune.protect(new_model(), threads=1, timeout=PATIENCE) as protected:
        process = protected.session.process
        assert not is_gone(process.pid)
    assert process.returncode == 0
    assert is_gone(process.pid)
    with pytest.raises(UsageError, match="the protected model was closed"):
        protected.model(input_ids=IDS)


@pytest.mark.parametrize(("profile", "is_stale"), [("balanced", False), ("paper", False), ("paper", True)])
def test_close_does_not_hang_on_a_worker_that_stands_still(
    profile: str, monkeypatch: pytest.MonkeyPatch, *, is_stale: bool
) -> None:
    """Stopped, it keeps its connection and takes what fits in the buffers. It has nothing that is not here."""
    monkeypatch.setattr("obfuscatune.enclave.protected.CLOSING_SECONDS", 0.2)
    protected = obfuscatune.protect(new_model(), profile=profile, worker="spawn", timeout=600)
    process = protected.session.process
    loss_of(protected.model).backward()
    protected.create_optimizer(lr=1e-3).step()
    if is_stale:  # as after a step that was interrupted
        protected._held.stale = True
    os.kill(process.pid, signal.SIGSTOP)
    monkeypatch.setattr("obfuscatune.enclave.lifetime.ENDING_SECONDS", 0.2)
    if is_stale:  # then it has, and that is told
        with pytest.raises(WorkerFault, match=r"no reply within 0\.2 s"):
            protected.close()
    else:
        protected.close()
    assert process.poll() == -signal.SIGKILL
    protected.close()


@pytest.mark.parametrize("waits_for", ["a reply", "room for its bytes"])
def test_close_does_not_wait_for_a_thread_that_waits_for_such_a_worker(
    waits_for: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("obfuscatune.enclave.protected.CLOSING_SECONDS", 0.2)
    monkeypatch.setattr("obfuscatune.enclave.lifetime.ENDING_SECONDS", 0.2)
    protected = obfuscatune.protect(new_model(), worker="spawn", timeout=20)
    session, told = protected.session, []
    lock = session._receiving if waits_for == "a reply" else session._sending

    def run() -> None:
        rows = {} if waits_for == "a reply" else {"x": torch.zeros(2**24)}  # beyond what the sockets hold
        with pytest.raises((UsageError, WorkerFault)) as caught:
            session.request("stats", "-", {}, rows, {})
        told.append(str(caught.value))

    os.kill(session.process.pid, signal.SIGSTOP)
    waiting = threading.Thread(target=run)
    waiting.start()
    while waiting.is_alive() and lock.acquire(blocking=False):
        lock.release()
        time.sleep(0.01)
    protected.close()
    waiting.join()
    assert told[0].startswith("the worker's session ended by an earlier fault (no reply within 0.2 s)")
    assert session.process.poll() == -signal.SIGKILL


def test_a_fault_at_the_end_does_not_hide_the_first_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(ZeroDivisionError) as caught,
        obfuscatune.protect(new_model(), profile="paper", worker="spawn", timeout=600) as protected,
    ):
        loss_of(protected.model).backward()
        protected.create_optimizer(lr=1e-3).step()
        protected._held.stale = True  # as after a step that was interrupted
        protected.session.process.kill()
        raise ZeroDivisionError
    assert caught.value.__notes__ == ["closing failed too: the worker is gone"]


@contextlib.contextmanager
def listening_worker(address: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A worker's process and the address it says it listens at."""
    command = [sys.executable, "-m", "obfuscatune.worker", "--threads", "1", "--listen", address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:  # noqa: S603
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("worker listening on "), line
            yield process, line.split()[3]
        finally:
            process.kill()


def test_a_worker_at_a_unix_address(tmp_path: Path) -> None:
    path = tmp_path / "w"
    with listening_worker(f"unix://{path}") as (process, address):
        assert path.is_socket()
        expected = loss_of(new_model())
        with obfuscatune.protect(new_model(), worker=address, timeout=PATIENCE) as first:
            torch.testing.assert_close(loss_of(first.model), expected)
        for _ in range(3):  # one after another it serves them all
            with obfuscatune.protect(new_model(), worker=address, timeout=PATIENCE) as protected:
                torch.testing.assert_close(loss_of(protected.model), expected)
        refused = start_in_vain(address)
        assert refused.returncode == 2
        assert "address is in use" in refused.stderr
        assert path.is_socket()
        with obfuscatune.protect(new_model(), worker=address, timeout=PATIENCE) as protected:
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0
            assert not path.exists()
            with pytest.raises(WorkerFault, match="the worker is gone"):
                loss_of(protected.model)


def test_a_second_enclave_waits_for_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with listening_worker(f"unix://{tmp_path / 'w'}") as (_, address), ThreadPoolExecutor(1) as pool:
        expected = loss_of(new_model())
        with obfuscatune.protect(new_model(), worker=address, timeout=PATIENCE):
            second = pool.submit(obfuscatune.protect, new_model(), worker=address, timeout=PATIENCE)
            told = ""
            while not told:
                assert not wait([second], timeout=0.05).done
                told = capsys.readouterr().err
        assert told == f"waiting for the worker at {address}: 1 session ahead\n"
        with second.result(PATIENCE) as protected:
            torch.testing.assert_close(loss_of(protected.model), expected)


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused = start_in_vain(f"tcp://127.0.0.1:{taken.getsockname()[1]}")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: address is in use (at tcp://127.0.0.1:")
    assert "Traceback" not in refused.stderr


def start_in_vain(address: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "obfuscatune.worker", "--listen", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)  # noqa: S603


@pytest.mark.parametrize(
    "option", ["--max_sessions 0", "--threads 0", "--threads 100000", "--memory_gb nan", "--memory_gb inf"]
)
def test_a_number_that_a_worker_cannot_have_is_misuse(option: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "obfuscatune.worker", "--listen", f"unix://{tmp_path}/w", *option.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)  # noqa: S603 - our own interpreter
    name, _, number = option.partition(" ")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: option of a worker: got {number}, expected ")
    assert done.stderr.endswith(f" (at {name})\n")
