"""``obfuscatune serve`` as people start it."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import openai
import pytest

from obfuscatune.cli import main


def test_it_serves_until_sigterm_and_answers_what_it_has(model_dir: Path, adapter_dirs, expect, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "obfuscatune", "serve", "--model_name_or_path", str(model_dir), "--port", "0"]
    command += ["--adapter", f"clinic={adapter_dirs['clinic']}", "--threads", "1", "--max_batch", "1"]
    with (
        (tmp_path / "err").open("w") as err,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True) as process,  # noqa: S603
    ):
        try:
            lines = [process.stdout.readline() for _ in range(3)]
            assert lines[0].startswith("serving base, clinic at http://127.0.0.1:")
            url, token = lines[0].split()[-1], lines[1].split()[-1]
            assert lines[2].strip() == f"page: {url.removesuffix('v1')}#token={token}"
            with openai.OpenAI(base_url=url, api_key=token, max_retries=0) as client:
                stream = client.completions.create(model="clinic", prompt="quokka", max_tokens=80, stream=True)
                first = next(iter(stream)).choices[0].text
                waiting: list[str] = []

                def ask() -> None:
                    reply = client.completions.create(model="base", prompt="quokka", max_tokens=3)
                    waiting.append(reply.choices[0].text)

                thread = threading.Thread(target=ask)
                thread.start()
                while client.get("/../metrics", cast_to=str).count("obfuscatune_waiting_requests 1\n") == 0:
                    assert thread.is_alive()
                process.send_signal(signal.SIGTERM)
                rest = "".join(chunk.choices[0].text for chunk in stream)
                thread.join()
            assert first + rest == expect("clinic", "quokka", 80)
            assert waiting == [expect("base", "quokka", 3)]
            assert process.wait(30) == 0
        finally:
            process.kill()
    said = (tmp_path / "err").read_text()
    assert "profile balanced" in said  # its report
    assert "quokka" not in said and token not in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--adapter", "x"], "--adapter"),
        (["--adapter", "base=dir"], "not base"),
        (["--adapter", "a.b=dir"], "letters, digits"),
        (["--adapter", "a=x", "--adapter", "a=y"], "each name once"),
        (["--adapter", "a=nowhere"], "cannot load the adapter"),
        (["--host", "0.0.0.0"], "in the clear"),  # noqa: S104
        (["--host", "example.org"], "in the clear"),
        (["--ssl_certfile", "cert.pem"], "https wants both"),
        (["--ssl_certfile", "nowhere.pem", "--ssl_keyfile", "nowhere.pem"], "certificate or key"),
        (["--token_file", "nowhere"], "cannot read the file"),
        (["--token_file", "open"], "others can read the tokens"),
        (["--token_file", "short"], "at least 20"),
        (["--request_seconds", "0"], "request_seconds"),
        (["--adapter", "train=dir"], "PyTorch uses itself"),
        (["--adapter", "lora_A=dir"], "PyTorch uses itself"),
        (["--adapter", "weight=dir"], "PyTorch uses itself"),
        (["--allowed_host", "example.org:443"], "name of a host"),
        (["--chat_template", "broken"], "not valid Jinja"),
        (["--port", "70000"], "above 65535"),
        (["--host", "127.0.0.256", "--insecure_http"], "cannot listen"),
        (["--chat_template", "binary"], "no UTF-8"),
        (["--profile", "paper", "--adapter", "a=x", "--adapter", "b=y"], "one adapter on the worker"),
    ],
)
def test_misuse_is_told_in_a_line(
    options: list[str], said: str, model_dir: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "open").write_text("a" * 40)
    (tmp_path / "open").chmod(0o644)
    (tmp_path / "short").write_text("secret\n")
    (tmp_path / "short").chmod(0o600)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "broken").write_text("{{ messages")
    port = [] if "--port" in options else ["--port", "0"]
    profile = [] if "--profile" in options else ["--profile", "enclave"]
    assert main(["serve", "--model_name_or_path", str(model_dir), *port, *profile, *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error and "secret" not in error
