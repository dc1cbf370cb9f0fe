"""README's way from the demo to a chat with the fine-tuned model through the ``openai`` package, as it stands there."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BINARIES = Path(sys.executable).parent  # what `. .venv/bin/activate` puts on the path


def lines_of_the_chat() -> tuple[str, str, str]:
    """Return the command for the template, the one that serves, and the client's."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    (block,) = (block for block in blocks if "obfuscatune serve" in block)
    template, serve, client = block.strip().split("\n", 2)
    return template, serve, client


def test_the_commands_are_where_the_page_says() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    template, serve, client = lines_of_the_chat()
    assert "chat.jinja" in template and serve.startswith("obfuscatune serve ") and "from openai import" in client
    # Before the first command that needs what make has set up: neither it nor that `python` is on the path by itself.
    assert readme.index(". .venv/bin/activate") < readme.index("\nobfuscatune ")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_demo_and_chat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "src").symlink_to(ROOT / "src")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    template, serve, client = lines_of_the_chat()
    path = f"{BINARIES}{os.pathsep}{os.environ['PATH']}"
    shell = {"cwd": tmp_path, "env": {**os.environ, "PATH": path}, "stdout": subprocess.PIPE, "text": True}

    def run(line: str) -> str:
        return subprocess.run(["bash", "-ec", line], check=True, **shell).stdout  # type: ignore[call-overload] # noqa: S603, S607

    began = time.monotonic()
    run("obfuscatune demo")  # what `make demo` runs
    run(template)
    with subprocess.Popen(["bash", "-c", f"exec {serve} --port {port}"], **shell) as server:  # type: ignore[call-overload] # noqa: S603, S607
        try:
            token = next(line.split()[1] for line in server.stdout if line.startswith("token: "))
            assert "TOKEN" in client and ":8000/" in client
            answer = run(client.replace("TOKEN", token).replace(":8000/", f":{port}/"))
        finally:
            server.terminate()
    seconds = time.monotonic() - began
    assert answer.split() == ["soul"]  # which it learnt in the demo
    assert server.returncode == 0
    with capsys.disabled():
        print(f"\n{seconds:.0f} s from the demo's beginning to the answer")
