"""Runs the commands of docs/three-parties.md as they stand there, in three directories, and records all traffic."""

# ruff: noqa: S602 - the document's own commands, for a shell

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "three-parties.md"
MACHINES = ("provider", "owner", "operator")
_PORT = "7443"
# What a process prints or makes once it can be talked to.
_READY = {"worker": "worker listening", "enclave": "listens at"}


def commands() -> list[tuple[str, str]]:
    """(machine, command) of every line of the document's console blocks."""
    text = DOCUMENT.read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    found = [re.fullmatch(r"(provider|owner|operator)\$ (.+)", line) for line in lines]
    assert found and all(found), "a line of a console block without a machine"
    return [(match[1], match[2]) for match in found]


def _family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for process in found:
        for task in Path(f"/proc/{process}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def memory_of(pid: int) -> Iterator[bytes]:
    """Everything readable in the memory of a process and of its children (the sandbox is one's parent)."""
    for each in _family(pid):
        with open(f"/proc/{each}/maps") as maps, open(f"/proc/{each}/mem", "rb", buffering=0) as memory:
            for line in maps:
                area, permissions = line.split()[:2]
                start, end = (int(part, 16) for part in area.split("-"))
                if permissions.startswith("r") and not line.rstrip().endswith(("[vvar]", "[vsyscall]")):
                    try:
                        memory.seek(start)
                        yield memory.read(end - start)
                    except (OSError, ValueError, OverflowError):
                        continue  # an area that even its owner cannot read


class Tap:
    """A relay that keeps every byte: what the operator sees on the way. ``target`` is a port, or a socket's path."""

    def __init__(self, target: int | str, path: str | None = None) -> None:
        self._target, self.captured = target, bytearray()
        self._lock = threading.Lock()
        if path is None:
            self._listener = socket.create_server(("127.0.0.1", 0))
        else:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(path)
            self._listener.listen()
        self.address = self._listener.getsockname()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._relay, args=(client,))
            self._threads.append(thread)
            thread.start()

    def _relay(self, client: socket.socket) -> None:
        family = socket.AF_UNIX if isinstance(self._target, str) else socket.AF_INET
        address = self._target if isinstance(self._target, str) else ("127.0.0.1", self._target)
        with client, contextlib.suppress(OSError), socket.socket(family) as server:
            server.connect(address)
            back = threading.Thread(target=self._pump, args=(server, client))
            back.start()
            self._pump(client, server)
            back.join()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                with self._lock:
                    self.captured += data
                target.sendall(data)
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the accept in the other thread
        self._listener.close()
        for thread in self._threads:
            thread.join(30)


class Machines:
    """Three directories, the processes that run in them, and the commands' output."""

    def __init__(self, root: Path, *, max_steps: int) -> None:
        self.root, self.max_steps = root, max_steps
        for name in MACHINES:
            (root / name).mkdir()
        tools = root / "bin"
        tools.mkdir()
        (tools / "obfuscatune").write_text(f'#!/bin/sh\nexec {sys.executable} -m obfuscatune "$@"\n')
        (tools / "obfuscatune").chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{tools}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT / "src"),
            "OMP_NUM_THREADS": "1",
        }
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.tap = Tap(self.port)
        self.asked: dict[str, Any] = {}  # what a client was told through `connect`
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self.started: dict[str, str] = {}
        self.output: list[str] = []
        self.kept: list[Path] = []
        self._said = threading.Event()
        self.readers: list[tuple[subprocess.Popen[str], threading.Thread]] = []

    def run(self, machine: str, command: str) -> str:
        """Run a command of the document and return its output; one that ends in & is left running."""
        if command.endswith("&"):
            kind = command.split()[1]
            self.started[kind] = command
            self.start(kind)
            return ""
        done = subprocess.run(
            self.here(command),
            shell=True,
            cwd=self.root / machine,
            env=self.environment,
            capture_output=True,
            input="y\n",  # to `job sign`, which asks
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, f"{machine}$ {command}\n{done.stdout}{done.stderr}"
        return done.stdout

    def here(self, command: str) -> str:
        """A party's command as it is run here: parties reach the enclave through the tap."""
        shorter = command.replace("--max_steps 60", f"--max_steps {self.max_steps}")
        return shorter.replace(_PORT, str(self.tap.address[1]))

    def begin(self, machine: str, command: str) -> "subprocess.Popen[str]":
        """Start a command of a party that something is to happen to meanwhile."""
        return subprocess.Popen(
            f"exec {self.here(command)}",
            shell=True,
            cwd=self.root / machine,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def start(self, kind: str) -> None:
        """Start a process of the operator, and wait until it says that it listens."""
        command = self.started[kind].rstrip("& ").replace(_PORT, str(self.port))
        process = subprocess.Popen(
            f"exec {command}",
            shell=True,
            cwd=self.root / "operator",
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.processes[kind] = process
        for line in process.stdout:
            self.output.append(line)
            if _READY[kind] in line:
                break
        else:
            raise AssertionError(f"{command}\n{''.join(self.output[-20:])}")
        reader = threading.Thread(target=lambda: self.output.extend(process.stdout), daemon=True)
        reader.start()
        self.readers.append((process, reader))

    def kill(self, kind: str) -> None:
        """kill -9."""
        self.processes[kind].send_signal(signal.SIGKILL)
        self.processes[kind].wait(30)

    def stop(self, kind: str) -> None:
        """End a process as systemd would, if it runs."""
        process = self.processes[kind]
        if process.poll() is None:
            process.terminate()
            assert process.wait(60) == 0, "".join(self.output[-20:])

    def fails_to_start(self, kind: str) -> str:
        """Start a process that must refuse to; return what it said."""
        command = self.started[kind].rstrip("& ").replace(_PORT, str(self.port))
        done = subprocess.run(
            command,
            shell=True,
            cwd=self.root / "operator",
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode != 0
        return done.stderr

    def wait(self, ready: Callable[[], bool], what: str) -> None:
        """Wait until something is true, looking whenever the enclave has written a file or said a line."""
        deadline = time.monotonic() + 120
        while not ready():
            assert time.monotonic() < deadline, f"{what} did not come\n{''.join(self.output[-20:])}"
            self._said.wait(0.05)

    def close(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(30)
        for process, reader in self.readers:
            reader.join(30)
            process.stdout.close()
        self.tap.close()
