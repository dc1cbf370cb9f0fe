"""What `enclave serve` lets the operator read, besides its own lines: nothing; and how long its stop takes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# A service that, instead of serving, does what a hostile model and a curious operator would make it do.
PROGRAM = """
import contextlib, os, sys, types
from obfuscatune.cli import main

@contextlib.contextmanager
def open_service(_, platform, **__):
    import huggingface_hub.constants, transformers
    from tokenizers import decoders
    transformers.utils.logging.get_logger("transformers.models.x").warning("CANARY of a library")
    os.write(2, b"CANARY of native code\\n")
    with contextlib.suppress(BaseException):
        decoders.Strip("h", 10, 10).decode(["h"])
    print("offline", huggingface_hub.constants.HF_HUB_OFFLINE, "on", platform.name, file=sys.stderr)
    raise SystemExit(0)
    yield

# In the place of the module, which would import transformers before the verb has set the scene.
sys.modules["obfuscatune.service.serve"] = types.SimpleNamespace(open_service=open_service)
hardware = ("--platform", f"simulation:{sys.argv[1]}", "--gpu", f"simulation:{sys.argv[1]}/gpu")
sys.exit(main(["enclave", "serve", *hardware, "--state", "s", "--parties", "p"]))
"""


def test_libraries_and_native_code_print_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "debug", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", PROGRAM, str(tmp_path / "platform")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert done.stderr == "offline True on simulated tdx with simulated GPU\n"


# A service in the middle of a step that does not end, where what is raised first is lost, as in a destructor.
STUCK = """
import contextlib, os, signal, sys, time, types
from obfuscatune.cli import main

class Service:
    identity, address = types.SimpleNamespace(fingerprint="f"), "tls://nowhere:1"

    def leave(self):
        print("leaving", file=sys.stderr)

    def work(self):
        os.kill(os.getpid(), signal.SIGTERM)
        with contextlib.suppress(SystemExit):
            time.sleep(60)
        time.sleep(60)

sys.modules["obfuscatune.service.serve"] = types.SimpleNamespace(
    open_service=lambda *_, **__: contextlib.nullcontext(Service()), LEAVING_SECONDS=0.1
)
sys.exit(main(["enclave", "serve", "--platform", f"simulation:{sys.argv[1]}", "--state", "s", "--parties", "p"]))
"""


def test_sigterm_has_a_bound_whatever_the_enclave_does(tmp_path: Path) -> None:
    done = subprocess.run(  # noqa: S603 - the step takes longer than the timeout
        [sys.executable, "-c", STUCK, str(tmp_path / "platform")], capture_output=True, text=True, timeout=50
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "leaving"), done.stderr


@pytest.mark.slow
def test_an_empty_directory_is_a_first_start_only_once(tmp_path: Path) -> None:
    """As where a disk is not mounted: the second one on a platform names `--new`, and begins nothing without it."""
    command = [sys.executable, "-m", "obfuscatune", "enclave", "serve", "--platform", "simulation:platform"]
    command += ["--parties", "parties", "--listen", "tls://127.0.0.1:0", "--worker", "unix:///nowhere"]

    def start(state: str, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(  # noqa: S603
            [*command, "--state", state, *more], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    said = []
    for state, more in (("state", ()), ("elsewhere", ()), ("elsewhere", ("--new",))):
        with start(state, *more) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            process.terminate()
            _, errors = process.communicate(timeout=50)
        said.append((process.returncode, line.split()[:1], "--new" in errors))
    assert said == [(0, ["enclave"], False), (2, [], True), (0, ["enclave"], False)]
