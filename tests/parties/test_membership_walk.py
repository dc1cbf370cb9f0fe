"""docs/membership.md, run as it stands: members come and go, and a new enclave takes over, with kill -9 on the way."""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from obfuscatune.cli import main

from .walkthrough import ROOT

pytestmark = pytest.mark.slow
TEXT = (ROOT / "docs" / "membership.md").read_text(encoding="utf-8")
MACHINES = ("provider", "owner", "operator", "third")


def commands() -> list[tuple[str, str]]:
    """(machine, command) of every line of the page's console blocks."""
    lines = [line for block in re.findall(r"```console\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]
    found = [re.fullmatch(rf"({'|'.join(MACHINES)})\$ (.+)", line) for line in lines]
    assert found and all(found), "a line of a console block without a machine"
    return [(match[1], match[2]) for match in found if match]


class Walk:
    """Four directories; enclaves as processes, the parties' verbs in this one."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self._monkeypatch, self._capsys = root, monkeypatch, capsys
        self.ports = {}
        for port in ("7443", "7444"):
            with socket.create_server(("127.0.0.1", 0)) as free:
                self.ports[port] = str(free.getsockname()[1])
        self.running: dict[str, subprocess.Popen[str]] = {}
        self.started: dict[str, str] = {}
        self.threads: dict[str, threading.Thread] = {}

    def here(self, command: str) -> str:
        for port, real in self.ports.items():
            command = command.replace(port, real)
        return command

    def run(self, machine: str, command: str) -> tuple[int, str]:
        """Run a command; return its exit code and what it said."""
        if command.endswith("&"):
            name = "new" if "--take_over" in command else "old"
            self.started[name] = self.here(command).rstrip("& ")
            self.start(name)
            return 0, ""
        if not command.startswith("obfuscatune"):
            subprocess.run(self.here(command), shell=True, cwd=self.root / machine, check=True)  # noqa: S602
            return 0, ""
        self._monkeypatch.chdir(self.root / machine)
        self._monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
        code = main(self.here(command).split()[1:])
        said = self._capsys.readouterr()
        return code, said.out + said.err

    def start(self, name: str) -> None:
        """Start an enclave, and wait until it says where it listens."""
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", *self.started[name].split()],
            cwd=self.root / "operator",
            env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.running[name] = process
        said = []
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if "listens at" in line or "waits for a hand-over" in line:
                break
        else:
            raise AssertionError("".join(said))
        thread = threading.Thread(target=process.stdout.read, daemon=True)
        thread.start()
        self.threads[name] = thread

    def kill(self, name: str) -> None:
        """kill -9, and a new start."""
        self.running[name].send_signal(signal.SIGKILL)
        self._end(name)
        self.start(name)

    def _end(self, name: str) -> None:
        process = self.running.pop(name)
        process.wait(30)
        self.threads.pop(name).join(30)
        assert process.stdout is not None
        process.stdout.close()

    def close(self) -> None:
        for process in self.running.values():
            process.terminate()
        for name in list(self.running):
            self._end(name)


@pytest.fixture
def walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Walk]:
    for name in MACHINES:
        (tmp_path / name).mkdir()
    (tmp_path / "operator" / "parties").mkdir()
    shutil.copytree(ROOT / "src/obfuscatune/studies/bundled/gpt2", tmp_path / "provider" / "model")
    rows = [{"prompt": f"room {number} is", "completion": f" number {number * 37}"} for number in range(4)]
    (tmp_path / "owner" / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    walk = Walk(tmp_path, monkeypatch, capsys)
    try:
        yield walk
    finally:
        walk.close()


def test_the_page(walk: Walk) -> None:
    said, handed = {}, 0
    for machine, command in commands():
        code, text = walk.run(machine, command)
        said[f"{machine} {command}"] = text
        if "hand-over" in command:
            handed += 1
            assert code == (1 if handed == 1 else 0), text
            if handed == 1:  # the old one after its commit, the new one before its own
                assert "log of the old enclave is not here" in text
                walk.kill("old")
                walk.kill("new")
                code, text = walk.run("owner", "obfuscatune party members")
                assert code == 0 and "closed" in text  # it tells what was, and does nothing more
                code, text = walk.run("provider", "obfuscatune job run job.json --detach")
                assert code != 0 and "handed over" in text
                more = "--to tls://127.0.0.1:7443 --file ../provider/enclave.upgrade"
                code, text = walk.run("owner", f"obfuscatune party hand-over {more}")
                assert code == 1 and "refused" in text  # to code that the statement does not name
            else:  # the new one after its commit, before anybody was told
                walk.kill("new")
                code, text = walk.run(machine, command)
                assert code == 0 and "handed over before" in text, text
            continue
        assert code == 0, f"{machine}$ {command}\n{text}"
    assert "open" in said["provider obfuscatune party members"]
    assert "second" in said["third obfuscatune party members"]
    left = said["owner obfuscatune party members"]
    assert "second" not in left.split("closed")[1].split("   0")[0] and "remove" in left
    assert list((walk.root / "owner" / "results" / "adapter").iterdir())
    code, text = walk.run("owner", "obfuscatune log fetch whole.log --enclave tls://127.0.0.1:7444")
    assert code == 0, text
    events = [json.loads(line)["event"] for line in (walk.root / "owner" / "whole.log").read_text().splitlines()[1:]]
    assert events.count("handed-over") == 1 and events.index("handed-over") < events.index("done")
    assert events.count("membership") >= 3
