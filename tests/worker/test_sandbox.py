"""The worker in bubblewrap: what it cannot reach, that it works all the same, and that it ends with its parent."""

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from obfuscatune.errors import UsageError
from obfuscatune.protocol.address import Address, connect, listen
from obfuscatune.protocol.connection import Connection
from obfuscatune.worker import sandbox
from obfuscatune.worker.sandbox import Sandbox

PATIENCE = 60  # seconds; nothing here takes more than a few
CANARY = "canary outside the sandbox"


@pytest.fixture(scope="module")
def inside() -> Sandbox:
    """A sandbox that works; where it cannot be had the test is skipped."""
    try:
        return Sandbox()
    except UsageError as error:
        pytest.skip(str(error).splitlines()[0])


def run(command: list[str], *arguments: str) -> dict[str, object]:
    """Run a script that prints a JSON object, with the environment of a real start."""
    done = subprocess.run(  # noqa: S603
        [*command, *arguments], env=sandbox._environment(), capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


PROBE = """
import glob, json, os, socket, sys
found = {}
def attempt(name, action):
    try:
        found[name] = action()
    except OSError as error:
        found[name] = type(error).__name__
attempt("read", lambda: open(sys.argv[1]).read())
attempt("home", lambda: open(sys.argv[2]).read())
attempt("tcp", lambda: socket.create_connection(("127.0.0.1", int(sys.argv[3])), 5).close())
def unix():
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(sys.argv[4])
        return "connected"
attempt("unix", unix)
attempt("abstract", lambda: socket.socket(socket.AF_UNIX).connect("\\0" + sys.argv[5]))
attempt("processes", lambda: sorted(int(name) for name in os.listdir("/proc") if name.isdigit())[-1])
attempt("signal", lambda: os.kill(int(sys.argv[6]), 0))
found["interfaces"] = [name for _, name in socket.if_nameindex()]
found["environment"] = sorted(os.environ)
found["users"] = os.path.exists("/etc/passwd")
found["gpus"] = glob.glob("/dev/nvidia*")
found["status"] = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines())
print(json.dumps(found))
"""


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What a process may find outside: a file, one in a home, listeners, a process; a secret in the environment."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CANARY_TOKEN", "canary")
    (tmp_path / "home").mkdir()
    files = [tmp_path / "secret", tmp_path / "home" / "secret"]
    for file in files:
        file.write_text(CANARY)
    abstract = f"obfuscatune-test-{os.getpid()}"
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as unix,
        socket.socket(socket.AF_UNIX) as hidden,
    ):
        path = os.path.relpath(tmp_path / "socket")  # the path of a unix socket has 107 bytes at most
        unix.bind(path)
        unix.listen()
        hidden.bind("\0" + abstract)
        hidden.listen()
        tcp.listen()
        yield [*map(str, files), str(tcp.getsockname()[1]), str(tmp_path / "socket"), abstract, str(os.getpid())]


def test_files_network_and_processes_are_out_of_reach(outside: list[str]) -> None:
    try:
        inside = Sandbox()  # made here: the home directory is another
    except UsageError as error:
        pytest.skip(str(error).splitlines()[0])
    found = run(inside.command("-c", PROBE), *outside)
    assert found["read"] == found["home"] == "FileNotFoundError"
    assert found["tcp"] == found["abstract"] == "ConnectionRefusedError"
    assert found["unix"] == "FileNotFoundError"
    assert found["signal"] == "ProcessLookupError"
    assert isinstance(found["processes"], int)
    assert found["processes"] < 10
    assert found["interfaces"] == ["lo"]
    assert "CANARY_TOKEN" not in found["environment"]  # type: ignore[operator]
    assert found["users"] is False
    assert found["gpus"] == []
    status = found["status"]
    assert isinstance(status, dict)
    assert status["NoNewPrivs"] == "1"
    assert {status[name] for name in ("CapEff", "CapPrm", "CapBnd")} == {"0" * 16}


def test_outside_they_are_in_reach(outside: list[str]) -> None:
    """The control: the same script without the sandbox."""
    command = [sys.executable, "-P", "-c", PROBE, *outside]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE)  # noqa: S603
    found = json.loads(done.stdout)
    assert found["read"] == found["home"] == CANARY
    assert found["tcp"] is found["abstract"] is found["signal"] is None
    assert found["unix"] == "connected"
    assert found["users"] is True
    assert "CANARY_TOKEN" in found["environment"]


WRITER = """
import json, obfuscatune, os, torch
found = {}
for directory in ("/", "/usr", "/sys/devices/system", *obfuscatune.__path__, *torch.__path__, "/tmp"):
    try:
        open(os.path.join(directory, "sandboxed"), "x").close()
        found[directory] = "written"
    except OSError as error:
        found[directory] = os.strerror(error.errno)
print(json.dumps(found))
"""


def test_only_its_own_tmp_can_be_written(inside: Sandbox) -> None:
    found = run(inside.command("-c", WRITER))
    assert found.pop("/tmp") == "written"  # noqa: S108
    assert len(found) == 5
    assert set(found.values()) <= {"Read-only file system", "Permission denied"}, found
    assert not Path("/tmp/sandboxed").exists()  # noqa: S108


@contextlib.contextmanager
def worker(address: str, *options: str, **environment: str) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "obfuscatune.worker", "--threads", "1", "--listen", address, *options]
    with subprocess.Popen(  # noqa: S603
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def address_of(process: "subprocess.Popen[str]") -> Address:
    assert process.stdout is not None
    return Address.parse(process.stdout.readline().split()[3])


def multiply(address: Address) -> "torch.Tensor":
    """One product by a worker: a session from its greeting to its end."""
    with contextlib.closing(Connection(connect(address, PATIENCE), peer="worker")) as connection:
        connection.settimeout(PATIENCE)
        connection.send({"id": 1, "op": "hello"})
        while "queued" in (reply := connection.receive()[0]):  # the session before it may not be gone yet
            pass
        assert reply["ok"]
        define = {"id": 2, "op": "define", "segment": "s", "kind": "linear", "spec": {}}
        connection.send(define, {"weight": 2 * torch.eye(4)})
        assert connection.receive()[0]["ok"]
        connection.send(
            {"id": 3, "op": "forward", "segment": "s", "keep": False, "factors": [], "held": []},
            {"x": torch.arange(4.0)[None, None]},
        )
        return connection.receive()[1]["y"]


@pytest.mark.parametrize(("scheme", "stop"), [("tcp", signal.SIGTERM), ("unix", signal.SIGINT)])
@pytest.mark.usefixtures("inside")
def test_a_sandboxed_worker_serves_and_leaves(scheme: str, stop: signal.Signals, tmp_path: Path) -> None:
    path = Path(os.path.relpath(tmp_path / "w"))
    with worker("tcp://127.0.0.1:0" if scheme == "tcp" else f"unix://{path}", "--sandbox", "bubblewrap") as process:
        address = address_of(process)
        for _ in range(2):
            assert torch.equal(multiply(address), 2 * torch.arange(4.0)[None, None])
        process.send_signal(stop)
        assert process.wait(PATIENCE) == 0
        assert not path.exists()
        listen(address).close()  # it is free at once


@pytest.mark.usefixtures("inside")
def test_a_killed_parent_takes_the_worker_along() -> None:
    with worker("tcp://127.0.0.1:0", "--sandbox", "bubblewrap") as process:
        address = address_of(process)
        connection = connect(address, PATIENCE)
        process.kill()
        assert select.select([connection], [], [], PATIENCE)[0], "the worker outlives its parent"
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""
        connection.close()


@pytest.mark.usefixtures("inside")
def test_a_fault_inside_is_told_outside(tmp_path: Path) -> None:
    path = Path(os.path.relpath(tmp_path / "w"))
    with worker(f"unix://{path}", "--sandbox", "bubblewrap", "--device", "cuda:63") as process:
        _, complaint = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert complaint.startswith("error: device not available")
    assert not path.exists()


def test_auto_without_bubblewrap_says_so(tmp_path: Path) -> None:
    with worker("tcp://127.0.0.1:0", PATH=str(tmp_path)) as process:
        assert torch.equal(multiply(address_of(process)), 2 * torch.arange(4.0)[None, None])
        process.terminate()
        _, complaint = process.communicate(timeout=PATIENCE)
    assert complaint == "warning: the worker runs without a sandbox: bubblewrap is not installed\n"
    assert process.returncode == 0


@pytest.mark.parametrize("there", [True, False])
def test_bubblewrap_that_does_not_work(
    there: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if there:
        program = tmp_path / "bwrap"
        program.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
        program.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    problem = (
        "bubblewrap does not work here: got 'bwrap: No permissions to create new namespace'"
        if there
        else "bubblewrap is not installed"
    )
    with pytest.raises(UsageError, match=problem):  # asked for by name, there is no silent fall back
        sandbox.choose("bubblewrap", "cpu")
    assert sandbox.choose("auto", "cpu") is None
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"warning: the worker runs without a sandbox: {problem.replace('got ', '')}")
    assert sandbox.choose("none", "cpu") is None
    assert capsys.readouterr().err == ""


def test_a_python_around_the_home_directory_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/bwrap")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    with pytest.raises(UsageError, match="would show the home directory"):
        Sandbox()


def test_only_a_worker_on_a_gpu_gets_its_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.glob, "glob", lambda pattern: ["/dev/nvidia0"] if "nvidia" in pattern else [])
    nodes = {device: "/dev/nvidia0" in list(sandbox._mounts(device)) for device in ("cpu", "cuda", "cuda:1")}
    assert nodes == {"cpu": False, "cuda": True, "cuda:1": True}
